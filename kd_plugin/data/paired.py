"""Sequences of conversations of which the teacher reads another text than the student.

Notable decisions:
- both sides have the same conversations in each sequence, in the same order, each side with positions of its own. A
  conversation takes as much room as the longer of its two texts, so that both fit; what the shorter one leaves is
  padding at the end of its sequence;
- one that is longer than a sequence, on either side, is left out: a piece of it would be read after another piece of
  the other side's. How many are is said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from kd_plugin.data.best_fit import best_fit
from kd_plugin.data.corpus import Corpus, Document, TeacherText
from kd_plugin.data.packing import Item, Sequences
from kd_plugin.data.record import DataError

__all__ = ["PairedDataset"]

logger = logging.getLogger(__name__)


class PairedDataset(Sequences):
    """Documents that each have a text for the teacher; items have what both sides read, and where rows correspond.

    Item i has beside input_ids, labels and position_ids the teacher's: teacher_input_ids and teacher_position_ids,
    int64 [seq_len], and teacher_rows, int64 [seq_len]: which token of the teacher's sequence predicts what this one of
    the student's predicts; -1 where nothing is trained on.

    Args:
        documents: what is packed.
        seq_len: tokens of a sequence, of either side.
        ignore_index: the label of what is not trained on.
        seed: shuffles the documents.
        keep_tail: whether less text than one sequence is accepted, as in evaluation.

    Raises:
        DataError: no document fits a sequence, or all together do not fill one.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        seq_len: int,
        ignore_index: int = -100,
        *,
        seed: int = 0,
        keep_tail: bool = False,
    ) -> None:
        corpus = Corpus.of(documents)
        theirs = np.array([len(_text(document).input_ids) for document in corpus])
        sizes = np.maximum(corpus.lengths, theirs)
        fitting = np.flatnonzero(sizes <= seq_len)
        if not len(fitting):
            raise DataError(
                f"no conversation fits data.seq_len {seq_len} tokens in both texts, the student's and the teacher's "
                f"(the shortest takes {sizes.min()}): raise it"
            )
        order = np.random.default_rng(seed).permutation(fitting)
        super().__init__(corpus.chosen(order), seq_len, ignore_index)
        if sizes[order].sum() < seq_len and not keep_tail:
            raise self.too_few()
        self._teacher_ends = np.cumsum(theirs[order])
        self._bins = best_fit(sizes[order], seq_len)
        self._tell(len(corpus) - len(fitting))

    def _tell(self, left_out: int) -> None:
        room, theirs = len(self) * self.seq_len, int(self._teacher_ends[-1])
        logger.info(
            "packed %d conversations into %d sequences of %d: %d tokens for the student (%.2f %% padding), %d for the "
            "teacher (%.2f %%)",
            *(len(self.documents), len(self), self.seq_len, self.num_tokens),
            *(100 - 100 * self.num_tokens / room, theirs, 100 - 100 * theirs / room),
        )
        if left_out:
            logger.warning(
                "teacher.input: %d conversation(s) are left out, longer than data.seq_len %d in one of the two texts",
                *(left_out, self.seq_len),
            )

    def __len__(self) -> int:
        return len(self._bins)

    def num_padding(self, index: int) -> int:
        """Tokens that the student's texts leave free in sequence `index`."""
        return self.seq_len - sum(len(self.documents[number].input_ids) for number in self._bins[index].tolist())

    def teacher_ids(self) -> Iterator[tuple[int, np.ndarray]]:
        """What the teacher reads of each document: the place of its first token among all of these, and the ids."""
        for number, document in enumerate(self.documents):
            ids = _text(document).input_ids
            yield int(self._teacher_ends[number]) - len(ids), ids

    def teacher_place(self, index: int) -> str:
        """The document that token `index` of all that the teacher reads comes from, and its position there."""
        document = int(self._teacher_ends.searchsorted(index, side="right"))
        start = int(self._teacher_ends[document]) - len(_text(self.documents[document]).input_ids)
        return self._named(document, index - start)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        documents = [self.documents[number] for number in self._bins[index].tolist()]
        labels = np.full(self.seq_len, self.ignore_index, dtype=np.int64)
        rows = np.full(self.seq_len, -1, dtype=np.int64)
        own = other = 0
        for document in documents:
            ids, theirs = document.input_ids, _text(document)
            trained = np.flatnonzero(document.trained[1:]) + 1  # nothing predicts the first token
            labels[own + trained] = ids[trained]
            rows[own + trained - 1] = other + theirs.at[trained] - 1
            own, other = own + len(ids), other + len(theirs.input_ids)
        ids, positions = self._laid_out([document.input_ids for document in documents])
        item = {"input_ids": ids, "labels": labels, "position_ids": positions, "teacher_rows": rows}
        ids, positions = self._laid_out([_text(document).input_ids for document in documents])
        return item | {"teacher_input_ids": ids, "teacher_position_ids": positions}

    def _laid_out(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and positions of one side's sequence, int64 [seq_len] each; padding is a text of its own."""
        texts = [*texts, np.zeros(self.seq_len - sum(map(len, texts)), dtype=np.int64)]
        positions = np.concatenate([np.arange(len(text)) for text in texts])
        return np.concatenate(texts).astype(np.int64), positions.astype(np.int64)


def _text(document: Document) -> TeacherText:
    assert document.teacher is not None
    return document.teacher
