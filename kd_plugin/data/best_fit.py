"""Pieces into bins of one size, with little room left over."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

import numpy as np

__all__ = ["Bins", "best_fit"]

_AT_ONCE = 2**16  # pieces whose numbers are objects of Python at a time


class Bins:
    """The numbers of the pieces in each bin, int [pieces] for bin i.

    Args:
        pieces: int [n], those of a bin side by side.
        bounds: int [bins + 1], where each bin begins, and the last one ends.
    """

    def __init__(self, pieces: np.ndarray, bounds: np.ndarray) -> None:
        self._pieces, self._bounds = pieces, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        return self._pieces[self._bounds[index] : self._bounds[index + 1]]


def best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Pack pieces into bins: the longest first, each into the fullest bin that has room for it.

    Args:
        lengths: int [n], 1 to `capacity` each.
        capacity: of a bin.
    """
    order = np.argsort(-lengths, kind="stable")
    fitted = _BestFit(capacity)
    parts = [order[at : at + _AT_ONCE] for at in range(0, len(order), _AT_ONCE)]
    bins = [np.array([fitted.bin_of(length) for length in lengths[part].tolist()], np.int64) for part in parts]
    by_bin = np.concatenate([np.empty(0, np.int64), *bins])
    bounds = np.concatenate([[0], np.cumsum(np.bincount(by_bin))])
    return Bins(order[np.argsort(by_bin, kind="stable")], bounds)


class _BestFit:
    """Bins that are filled piece by piece; of each only its room is kept."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_bins = capacity, 0
        # Numbers of 8 bytes, as there may be many bins.
        self._with_room = [array("q") for _ in range(capacity + 1)]  # room -> bins
        self._rooms: list[int] = []  # sorted, of which there are bins

    def bin_of(self, length: int) -> int:
        """The bin that a piece of this length goes into."""
        at = bisect_left(self._rooms, length)
        if at == len(self._rooms):
            room, chosen = self.capacity, self.num_bins
            self.num_bins += 1
        else:
            room = self._rooms[at]
            chosen = self._with_room[room].pop()
            if not self._with_room[room]:
                del self._rooms[at]
        if left := room - length:
            if not self._with_room[left]:
                insort(self._rooms, left)
            self._with_room[left].append(chosen)
        return chosen
