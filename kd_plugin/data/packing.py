"""Fixed-length sequences out of documents, and which of them each rank sees in each step.

Notable decisions:
- joined, documents are laid end to end and cut every `seq_len` tokens: no padding, no token twice, and a document
  reads whatever stands before it. The tail that fills no sequence is left out of training (and kept, padded, in
  evaluation). Packing that keeps documents apart is in `data.isolated`;
- nothing is predicted across the start of a document: its first token is no target;
- the sequences of a step follow from (seed, step) and their number alone: to resume is to ask for step k,
  and any split over ranks, micro-batches and accumulation sees the same step.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from kd_plugin.data.batch import Batch, Item, collate
from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.record import DataError

__all__ = [
    "Batch",
    "Document",
    "Item",
    "PackedDataset",
    "Sequences",
    "TrainBatches",
    "collate",
    "eval_batches",
    "indices_for_step",
]

logger = logging.getLogger(__name__)


class Sequences(ABC):
    """Sequences of exactly `seq_len` tokens out of documents.

    Item i is {input_ids, labels}, both int64 [seq_len], and position_ids (int64 [seq_len]) where documents are to be
    kept apart. `labels` are unshifted, as in Hugging Face: labels[s] is input_ids[s], or `ignore_index` where that
    token is not trained on.

    The documents stay where they are, and a sequence is cut out of them when it is asked for.

    Attributes:
        documents: in the order in which they are laid end to end.
        starts: int64 [documents], the index at which each begins among all tokens.
        num_tokens: of all documents.
        soft_on_all: whether items say what of them the soft loss counts on: `scored`, bool [seq_len], False for
            padding. Without, it counts where a token is trained on.
    """

    def __init__(
        self, documents: Sequence[Document], seq_len: int, ignore_index: int, *, soft_on_all: bool = False
    ) -> None:
        self.seq_len, self.ignore_index = seq_len, ignore_index
        self.documents, self.soft_on_all = Corpus.of(documents), soft_on_all
        ends = np.cumsum(self.documents.lengths)
        self.starts, self.num_tokens = ends - self.documents.lengths, int(ends[-1])

    def read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and targets (bool) of the tokens from `first` to before `stop` of all, [stop - first].

        Targets are what is trained on; the first token of a document never is.
        """
        document = int(self.starts.searchsorted(first, side="right")) - 1
        ids, marks, at = [], [], first
        while at < stop:
            its_ids, its_marks = self.documents.tokens(document)
            begin = at - int(self.starts[document])
            part = slice(begin, begin + stop - at)
            ids.append(its_ids[part])
            marks.append(its_marks[part])
            at, document = at + len(ids[-1]), document + 1
        return np.concatenate(ids), np.concatenate(marks) & self.scored(first, stop)

    def scored(self, first: int, stop: int) -> np.ndarray:
        """Whether the soft loss may count on the tokens from `first` to before `stop` of all, bool [stop - first].

        Nothing stands before the first token of a document that would predict it.
        """
        scored = np.ones(stop - first, dtype=bool)
        begins = self.starts[self.starts.searchsorted(first) : self.starts.searchsorted(stop)]
        scored[begins - first] = False
        return scored

    def place(self, index: int) -> str:
        """The document that token `index` of all tokens comes from, and its position there, both counted from 1."""
        document = int(self.starts.searchsorted(index, side="right")) - 1
        return self._named(document, index - int(self.starts[document]))

    def _named(self, document: int, token: int) -> str:
        where = self.documents[document].where
        return f"document {document + 1}" + (f" ({where})" if where else "") + f", token {token + 1}"

    def with_ids_from(self, lowest: int) -> Iterator[tuple[int, np.ndarray]]:
        """The documents with an id of `lowest` or more: the index of the first of all its tokens, and its ids."""
        for document in np.flatnonzero(self.documents.column("highest") >= lowest).tolist():
            yield int(self.starts[document]), self.documents.tokens(document)[0]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item: ...

    @abstractmethod
    def num_padding(self, index: int) -> int:
        """Tokens at the end of sequence `index` that are of no document."""

    def too_few(self) -> DataError:
        """The error about documents that do not fill one sequence."""
        return DataError(
            f"{len(self.starts)} document(s) with {self.num_tokens} tokens fill no sequence of data.seq_len "
            f"{self.seq_len}; lower data.seq_len or give more text"
        )


class PackedDataset(Sequences):
    """Documents end to end. With `keep_tail` the last sequence may be short, and is filled up with ignored tokens.

    Raises:
        DataError: not enough tokens for one sequence.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        seq_len: int,
        ignore_index: int = -100,
        *,
        keep_tail: bool = False,
        soft_on_all: bool = False,
    ) -> None:
        super().__init__(documents, seq_len, ignore_index, soft_on_all=soft_on_all)
        self.num_sequences, self.num_left_out = divmod(self.num_tokens, seq_len)
        if keep_tail and self.num_left_out:
            self.num_sequences, self.num_left_out = self.num_sequences + 1, 0
        if not self.num_sequences:
            raise self.too_few()
        logger.info(
            "packed %d tokens into %d sequences of %d; %d tokens at the end are left out",
            *(self.num_tokens, self.num_sequences, seq_len, self.num_left_out),
        )

    def __len__(self) -> int:
        return self.num_sequences

    def num_padding(self, index: int) -> int:
        """Tokens that the last sequence lacks, if it was kept; 0 for all others."""
        return max(0, (index + 1) * self.seq_len - self.num_tokens)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        first, stop = index * self.seq_len, min((index + 1) * self.seq_len, self.num_tokens)
        part, targets = self.read(first, stop)
        ids, missing = part.astype(np.int64), self.num_padding(index)
        labels = np.where(targets, ids, self.ignore_index)
        scored = {"scored": np.pad(self.scored(first, stop), (0, missing))} if self.soft_on_all else {}
        return {
            # Causal attention: what stands in the padding reaches no real token.
            "input_ids": np.pad(ids, (0, missing)),
            "labels": np.pad(labels, (0, missing), constant_values=self.ignore_index),
            **scored,
        }


def indices_for_step(num_items: int, step: int, sequences_per_step: int, seed: int) -> np.ndarray:
    """Indices of the items that optimizer step `step` (from 0) reads: int64 [sequences_per_step].

    Items are taken in epochs, each in an order drawn from (seed, epoch); an epoch may end within a step.
    """
    places = np.arange(step * sequences_per_step, (step + 1) * sequences_per_step)
    epochs, offsets = np.divmod(places, num_items)
    return np.array([_order(num_items, seed, int(e))[o] for e, o in zip(epochs, offsets, strict=True)])


@lru_cache(maxsize=2)  # a step may span two epochs
def _order(num_items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_items)


class TrainBatches:
    """The micro-batches of each step for one rank; holds no position, so nothing has to be saved."""

    def __init__(
        self,
        dataset: Sequences,
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.seed, self.rank, self.world_size = dataset, seed, rank, world_size
        self.micro_batch_size, self.num_micro_batches = micro_batch_size, gradient_accumulation_steps
        self.sequences_per_step = micro_batch_size * gradient_accumulation_steps * world_size
        if self.sequences_per_step > len(dataset):
            logger.warning(
                "one step takes %d sequences and there are %d: some are seen more than once in a step",
                *(self.sequences_per_step, len(dataset)),
            )

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0."""
        indices = indices_for_step(len(self.dataset), step, self.sequences_per_step, self.seed)
        shares = indices.reshape(self.num_micro_batches, self.world_size, self.micro_batch_size)
        return [_batch(self.dataset, share) for share in shares[:, self.rank]]

    def epochs(self, num_steps: int) -> float:
        """How many times `num_steps` steps read the data."""
        return num_steps * self.sequences_per_step / len(self.dataset)


def eval_batches(
    dataset: Sequences, *, num_sequences: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of `num_sequences` held-out sequences, evenly spaced over the dataset.

    All ranks get the same number of batches of the same shape, as sharded models need: places left over are
    filled with a sequence whose labels are all ignored. The union over ranks depends on no number of ranks.
    """
    num_sequences = min(num_sequences, len(dataset))
    chosen = np.arange(num_sequences) * len(dataset) // num_sequences
    per_round = micro_batch_size * world_size
    filled = np.full(-(-num_sequences // per_round) * per_round, -1)
    filled[:num_sequences] = chosen
    for share in filled.reshape(-1, world_size, micro_batch_size)[:, rank]:
        yield _batch(dataset, share)


def _batch(dataset: Sequences, indices: np.ndarray) -> Batch:
    """The items at `indices`; -1 stands for one without targets."""
    items = []
    for index in indices.tolist():
        item = dataset[max(index, 0)]
        if index < 0:
            item["labels"] = np.full_like(item["labels"], dataset.ignore_index)
            item |= {name: np.zeros_like(item[name]) for name in ("scored",) if name in item}
        items.append(item)
    return collate(items, dataset.ignore_index)
