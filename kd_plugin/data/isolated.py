"""Sequences in which each document stands for itself.

Notable decisions:
- a document that fits into a sequence stays whole; a longer one is cut every `seq_len` tokens, and what is left of it
  is packed like a document. Best fit, the longest first (as in arXiv:2404.10830, "Fewer Truncations Improve Language
  Modeling"), which on ordinary text leaves a percent or less of padding;
- the documents are shuffled before, so that which of equal length share a sequence does not follow the data's order;
- positions start anew in each piece, and padding is a piece of its own. What keeps attention apart is up to each model
  (`plugin.isolation`);
- a piece without a target (a prompt that fills one, a last single token) reaches no loss here, and is left out; where
  the soft loss counts on all tokens, only single ones do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd_plugin.data.best_fit import best_fit
from kd_plugin.data.corpus import Document
from kd_plugin.data.packing import Item, PackedDataset, Sequences
from kd_plugin.data.paired import PairedDataset
from kd_plugin.data.record import DataError

if TYPE_CHECKING:
    from kd_plugin.settings.run import DataConfig

__all__ = ["IsolatedDataset", "pack"]

logger = logging.getLogger(__name__)

_MUCH_PADDING = 0.02


def pack(
    documents: Sequence[Document],
    config: DataConfig,
    ignore_index: int,
    *,
    seed: int,
    keep_tail: bool,
    soft_on_all: bool = False,
) -> Sequences:
    """Sequences of `config.seq_len` tokens, packed as `config.packing` says.

    `seed` shuffles documents that are kept apart; with `keep_tail` less text than one sequence is enough, and with
    `soft_on_all` the soft loss counts on every token.

    Raises:
        DataError: the documents fill no sequence.
    """
    how = {"keep_tail": keep_tail, "soft_on_all": soft_on_all}
    if documents and documents[0].teacher is not None:
        return PairedDataset(documents, config.seq_len, ignore_index, seed=seed, keep_tail=keep_tail)
    if config.packing == "joined":
        return PackedDataset(documents, config.seq_len, ignore_index, **how)
    return IsolatedDataset(documents, config.seq_len, ignore_index, seed=seed, **how)


class IsolatedDataset(Sequences):
    """Documents that do not read each other; items have position_ids, which start anew with each document.

    Args:
        documents: what is packed.
        seq_len: tokens of a sequence.
        ignore_index: the label of what is not trained on.
        seed: shuffles the documents.
        keep_tail: whether less text than one sequence is accepted, as in evaluation.
        soft_on_all: whether the soft loss counts on every token.

    Raises:
        DataError: not enough tokens for one sequence, or none to train on.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        seq_len: int,
        ignore_index: int = -100,
        *,
        seed: int = 0,
        keep_tail: bool = False,
        soft_on_all: bool = False,
    ) -> None:
        super().__init__(documents, seq_len, ignore_index, soft_on_all=soft_on_all)
        if self.num_tokens < seq_len and not keep_tail:
            raise self.too_few()
        number = -(-self.documents.lengths // seq_len)  # pieces of each document
        first, lengths = self._pieces(number)
        counted = lengths > 1 if soft_on_all else self._with_targets(number, lengths)
        if not counted.any():
            raise DataError(f"no document has a token to train on within data.seq_len {seq_len} tokens: raise it")
        self.num_left_out = int(lengths[~counted].sum())
        order = np.random.default_rng(seed).permutation(np.flatnonzero(counted))
        self._first, self._lengths = first[order], lengths[order]
        self._bins = best_fit(self._lengths, seq_len)
        num_tokens = int(self._lengths.sum())
        self.padding = 1 - num_tokens / (len(self._bins) * seq_len)
        """Share of all tokens that is padding."""
        self._tell(num_tokens, num_cut=len(first) - len(documents))

    def _pieces(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and length of each piece, in the order of the documents."""
        within = np.arange(number.sum()) - (np.cumsum(number) - number).repeat(number)
        left = self.documents.lengths.repeat(number) - within * self.seq_len
        return self.starts.repeat(number) + within * self.seq_len, np.minimum(left, self.seq_len)

    def _with_targets(self, number: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether each piece has a token to train on, bool [pieces]; what would predict its first stands in another.

        The index says so of documents that are trained on whole, or are one piece. Of the others the marks are read.
        """
        documents = self.documents
        whole = documents.column("num_trained") == documents.column("length")
        one = np.where(number == 1, documents.column("last_trained"), 0).repeat(number)
        found = np.where(whole.repeat(number), lengths > 1, one > 0)
        begins = np.cumsum(number) - number
        for document in np.flatnonzero(~whole & (number > 1)).tolist():
            marks = documents.tokens(document)[1].copy()
            cuts = np.arange(0, len(marks), self.seq_len)
            marks[cuts] = False
            begin = begins[document]
            found[begin : begin + len(cuts)] = np.logical_or.reduceat(marks, cuts)
        return found

    def _tell(self, num_tokens: int, num_cut: int) -> None:
        logger.info(
            "packed %d tokens of %d documents or pieces into %d sequences of %d, each document by itself: %.2f %% "
            "padding; longer documents were cut in %d places; %d tokens in pieces without a target are left out",
            *(num_tokens, len(self._lengths), len(self), self.seq_len, 100 * self.padding, num_cut, self.num_left_out),
        )
        if self.padding > _MUCH_PADDING and len(self) > 1:
            logger.warning(
                "data.packing isolated: %.1f %% of what the models read is padding, as the documents do not fill "
                "data.seq_len %d better without being cut: another length may waste less",
                *(100 * self.padding, self.seq_len),
            )

    def __len__(self) -> int:
        return len(self._bins)

    def num_padding(self, index: int) -> int:
        """Tokens that the documents of sequence `index` leave free."""
        return self.seq_len - int(self._lengths[self._bins[index]].sum())

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        pieces = self._bins[index]
        ids, labels = [], []
        for first, length in zip(self._first[pieces].tolist(), self._lengths[pieces].tolist(), strict=True):
            part, targets = self.read(first, first + length)
            targets[0] = False
            ids.append(part.astype(np.int64))
            labels.append(np.where(targets, ids[-1], self.ignore_index))
        missing = self.num_padding(index)
        positions = [np.arange(length) for length in (*self._lengths[pieces], missing)]
        positions = np.concatenate(positions).astype(np.int64)
        item = {
            "input_ids": np.pad(np.concatenate(ids), (0, missing)),
            "labels": np.pad(np.concatenate(labels), (0, missing), constant_values=self.ignore_index),
            "position_ids": positions,
        }
        if self.soft_on_all:
            item["scored"] = (positions > 0) & (np.arange(self.seq_len) < self.seq_len - missing)
        return item
