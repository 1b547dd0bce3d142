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

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kd_plugin.data.batch import Batch, Item, collate
from kd_plugin.data.records import DataError

__all__ = [
    "Batch",
    "Document",
    "Item",
    "PackedDataset",
    "Sequences",
    "TeacherText",
    "TrainBatches",
    "collate",
    "eval_batches",
    "indices_for_step",
]

logger = logging.getLogger(__name__)


class TeacherText(NamedTuple):
    """What the teacher reads of a document, where that is another text."""

    input_ids: np.ndarray
    """Token ids, int32 [m]."""

    at: np.ndarray
    """int64 [n]: the place in it of each token of the document that is trained on; -1 for all others."""


class Document(NamedTuple):
    """One tokenised document."""

    input_ids: np.ndarray
    """Token ids, int32 [n]."""

    trained: np.ndarray
    """bool [n]: whether the token is a target."""

    where: str = ""
    """Its place in the data, for errors."""

    teacher: TeacherText | None = None
    """What the teacher reads, where that is not the document itself."""

    def digest(self) -> bytes:
        """What its copies have in common, and no other document."""
        return hashlib.sha256(self.input_ids.tobytes()).digest()


class Sequences(ABC):
    """Sequences of exactly `seq_len` tokens out of documents.

    Item i is {input_ids, labels}, both int64 [seq_len], and position_ids (int64 [seq_len]) where documents are to be
    kept apart. `labels` are unshifted, as in Hugging Face: labels[s] is input_ids[s], or `ignore_index` where that
    token is not trained on.

    Attributes:
        input_ids: int32 [T], the tokens of all documents.
        targets: bool [T], whether each is trained on; the first of a document never is.
        starts: int64 [documents], the index at which each document begins.
        scored: bool [T], whether the soft loss counts on each token, and items have their part of it, bool [seq_len],
            False for padding; None: it counts where a token is trained on.
    """

    def __init__(
        self, documents: Sequence[Document], seq_len: int, ignore_index: int, *, soft_on_all: bool = False
    ) -> None:
        self.seq_len, self.ignore_index = seq_len, ignore_index
        self.input_ids = np.concatenate([document.input_ids for document in documents])
        self.targets = np.concatenate([document.trained for document in documents])
        self.starts = np.cumsum([0, *(len(document.input_ids) for document in documents[:-1])])
        self.places = [document.where for document in documents]
        self.scored = np.ones(len(self.targets), dtype=bool) if soft_on_all else None
        self._not_predicted(self.starts)

    def _not_predicted(self, tokens: np.ndarray) -> None:
        """Tokens with which something begins: nothing stands before them that would predict them."""
        self.targets[tokens] = False
        if self.scored is not None:
            self.scored[tokens] = False

    def _scored(self, tokens: slice | np.ndarray, padding: int) -> Item:
        """The part of `scored` of an item's tokens, by its key; empty where there is none."""
        return {} if self.scored is None else {"scored": np.pad(self.scored[tokens], (0, padding))}

    def place(self, index: int) -> str:
        """The document that token `index` of all tokens comes from, and its position there, both counted from 1."""
        document = int(np.searchsorted(self.starts, index, side="right")) - 1
        name = f"document {document + 1}" + (f" ({self.places[document]})" if self.places[document] else "")
        return f"{name}, token {index - self.starts[document] + 1}"

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
            f"{len(self.starts)} document(s) with {len(self.input_ids)} tokens fill no sequence of data.seq_len "
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
        num_tokens = len(self.input_ids)
        self.num_sequences, self.num_left_out = divmod(num_tokens, seq_len)
        if keep_tail and self.num_left_out:
            self.num_sequences, self.num_left_out = self.num_sequences + 1, 0
        if not self.num_sequences:
            raise self.too_few()
        logger.info(
            "packed %d tokens into %d sequences of %d; %d tokens at the end are left out",
            *(num_tokens, self.num_sequences, seq_len, self.num_left_out),
        )

    def __len__(self) -> int:
        return self.num_sequences

    def num_padding(self, index: int) -> int:
        """Tokens that the last sequence lacks, if it was kept; 0 for all others."""
        return max(0, (index + 1) * self.seq_len - len(self.input_ids))

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        part = slice(index * self.seq_len, (index + 1) * self.seq_len)
        ids = self.input_ids[part].astype(np.int64)
        labels = np.where(self.targets[part], ids, self.ignore_index)
        missing = self.seq_len - len(ids)
        return {
            # Causal attention: what stands in the padding reaches no real token.
            "input_ids": np.pad(ids, (0, missing)),
            "labels": np.pad(labels, (0, missing), constant_values=self.ignore_index),
            **self._scored(part, missing),
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
