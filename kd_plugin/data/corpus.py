"""Tokenised documents of which only an index is held: their tokens lie in mapped files, or in memory in blocks.

Notable decisions:
- a corpus is an order of documents over blocks of tokens. To choose, mix or repeat documents makes another order, and
  copies no token;
- what is decided by a document (its length, its content, what of it is trained on, its highest id) stands in its row of
  the index, 32 bytes, so that neither holding out nor packing reads the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np

from kd_plugin.data.record import DataError

__all__ = ["ROW", "Block", "Corpus", "Document", "TeacherText", "blocks_of", "grouped"]

ROW = np.dtype(
    [
        ("digest", np.uint64),  # as Document.digest
        ("first", np.int64),  # its first token in its block
        ("length", np.int32),  # tokens
        ("num_trained", np.int32),  # tokens that are trained on
        ("last_trained", np.int32),  # the last of these, -1 for none
        ("highest", np.int32),  # its highest id
    ]
)
"""What the index holds of a document."""

_BLOCK_TOKENS, _BLOCK_DOCUMENTS = 2**20, 2**14
"""What is held at a time while tokens are gathered: so many, and one document more."""
_LONGEST = 2**31 - 1  # tokens of a document; Arrow's lists, and the index, have places of 32 bits

_Item = TypeVar("_Item")


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
    """What the teacher reads; None: the same."""

    def digest(self) -> int:
        """A number of 64 bits that its copies have in common, and no other document but by rare chance."""
        return int.from_bytes(hashlib.sha256(np.ascontiguousarray(self.input_ids).data).digest()[:8], "big")


class Block(NamedTuple):
    """Documents whose tokens lie side by side."""

    input_ids: np.ndarray
    """int32 [t], of all its documents."""

    trained: np.ndarray
    """bool [t]."""

    where: Callable[[int], str]
    """Number of a document in the block -> its place in the data."""

    num_documents: int

    teacher: Sequence[TeacherText | None] = ()
    """Of each document, in memory; empty where the teacher reads the same."""


class Corpus(Sequence[Document]):
    """Documents in an order, each a view of its block.

    Args:
        blocks: the tokens.
        index: `ROW` [documents of all blocks].
        order: int [n], which documents of the index these are; None for all of them.
    """

    def __init__(self, blocks: Sequence[Block], index: np.ndarray, order: np.ndarray | None = None) -> None:
        self._blocks, self._index, self._order = blocks, index, order
        self._ends = np.cumsum([block.num_documents for block in blocks], dtype=np.int64)
        self._first, self._length = index["first"], index["length"]

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Corpus:
        """The same documents as a corpus in memory; itself if they are a corpus."""
        if isinstance(documents, Corpus):
            return documents
        found = list(blocks_of(documents))
        return cls([block for block, _ in found], np.concatenate([np.empty(0, ROW), *(rows for _, rows in found)]))

    @classmethod
    def joined(cls, corpora: Sequence[Corpus]) -> Corpus:
        """The documents of all `corpora`, one after the other."""
        if len(corpora) == 1:
            return corpora[0]
        begins = np.cumsum([0, *(len(corpus._index) for corpus in corpora)])
        orders = [corpus._numbers() + begin for corpus, begin in zip(corpora, begins[:-1], strict=True)]
        blocks = [block for corpus in corpora for block in corpus._blocks]
        return cls(blocks, np.concatenate([corpus._index for corpus in corpora]), np.concatenate(orders))

    def chosen(self, places: np.ndarray) -> Corpus:
        """The documents at `places`, int [n], in their order; one may stand there several times."""
        return Corpus(self._blocks, self._index, places if self._order is None else self._order[places])

    def column(self, name: str) -> np.ndarray:
        """A field of `ROW` of each document, [n]."""
        values = self._index[name]
        return values if self._order is None else values[self._order]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [n]."""
        return self.column("length").astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.column("length").sum(dtype=np.int64))

    def tokens(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and marks (bool) of document `at`, views [n]."""
        block, _, part = self._place(at)
        return block.input_ids[part], block.trained[part]

    def __len__(self) -> int:
        return len(self._index if self._order is None else self._order)

    @overload
    def __getitem__(self, at: int) -> Document: ...

    @overload
    def __getitem__(self, at: slice) -> Corpus: ...

    def __getitem__(self, at: int | slice) -> Document | Corpus:
        if isinstance(at, slice):
            return self.chosen(np.arange(len(self))[at])
        block, number, part = self._place(range(len(self))[at])
        teacher = block.teacher[number] if block.teacher else None
        return Document(block.input_ids[part], block.trained[part], block.where(number), teacher)

    def _numbers(self) -> np.ndarray:
        return np.arange(len(self._index)) if self._order is None else self._order

    def _place(self, at: int) -> tuple[Block, int, slice]:
        """The block of document `at`, its number there, and its tokens there."""
        number = at if self._order is None else int(self._order[at])
        block = int(self._ends.searchsorted(number, side="right"))
        first = int(self._first[number])
        begin = int(self._ends[block - 1]) if block else 0
        return self._blocks[block], number - begin, slice(first, first + int(self._length[number]))


def blocks_of(documents: Iterable[Document]) -> Iterator[tuple[Block, np.ndarray]]:
    """Gather documents, as they come, into blocks of a bounded size, each with its rows of the index.

    Raises:
        DataError: a document with more tokens than a place of 32 bits can tell.
    """
    for group in grouped(documents, lambda document: len(document.input_ids), _BLOCK_TOKENS, _BLOCK_DOCUMENTS):
        places = [document.where for document in group]
        arrays = zip(*((document.input_ids, document.trained) for document in group), strict=True)
        # One document is not copied, as it may be a mapped file.
        ids, trained = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in arrays)
        rows = np.array([_row(document) for document in group], dtype=ROW)
        rows["first"] = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
        teacher = [document.teacher for document in group]
        texts = teacher if any(text is not None for text in teacher) else ()
        yield Block(ids, trained, places.__getitem__, len(group), texts), rows


def _row(document: Document) -> tuple[int, ...]:
    ids, trained, where, _ = document
    if len(ids) > _LONGEST:
        raise DataError(f"{where}: a document of {len(ids)} tokens; split it into some of {_LONGEST} at most")
    last = len(ids) - 1 - int(trained[::-1].argmax()) if trained.any() else -1
    return document.digest(), 0, len(ids), int(np.count_nonzero(trained)), last, int(ids.max(initial=0))


def grouped(items: Iterable[_Item], size_of: Callable[[_Item], int], most: int, number: int) -> Iterator[list[_Item]]:
    """Lists of items that follow one another: each ends with `number` items, or once their sizes come to `most`."""
    group: list[_Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= most or len(group) == number:
            yield group
            group, size = [], 0
    if group:
        yield group
