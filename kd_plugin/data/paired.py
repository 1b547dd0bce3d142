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
from collections.abc import Sequence

import numpy as np

from kd_plugin.data.best_fit import best_fit
from kd_plugin.data.packing import Document, Item, Sequences, TeacherText
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
        sizes = np.array([max(len(document.input_ids), len(_text(document).input_ids)) for document in documents])
        fitting = np.flatnonzero(sizes <= seq_len)
        if not len(fitting):
            raise DataError(
                f"no conversation fits data.seq_len {seq_len} tokens in both texts, the student's and the teacher's "
                f"(the shortest takes {sizes.min()}): raise it"
            )
        order = np.random.default_rng(seed).permutation(fitting)
        super().__init__([documents[index] for index in order], seq_len, ignore_index)
        if sizes[order].sum() < seq_len and not keep_tail:
            raise self.too_few()
        self.documents = [documents[index] for index in order]
        self.teacher_ids = np.concatenate([_text(document).input_ids for document in self.documents])
        """int32, what the teacher reads of all documents."""
        self._bins = best_fit(sizes[order], seq_len)
        self._tell(len(documents) - len(fitting))

    def _tell(self, left_out: int) -> None:
        room = len(self) * self.seq_len
        logger.info(
            "packed %d conversations into %d sequences of %d: %d tokens for the student (%.2f %% padding), %d for the "
            "teacher (%.2f %%)",
            *(len(self.documents), len(self), self.seq_len, len(self.input_ids)),
            *(100 - 100 * len(self.input_ids) / room, len(self.teacher_ids), 100 - 100 * len(self.teacher_ids) / room),
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
        return self.seq_len - sum(len(self.documents[number].input_ids) for number in self._bins[index])

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        documents = [self.documents[number] for number in self._bins[index]]
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
