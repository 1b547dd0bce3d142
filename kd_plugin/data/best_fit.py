"""Pieces into bins of one size, with little room left over."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

__all__ = ["best_fit"]


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack pieces into bins: the longest first, each into the fullest bin that has room for it.

    Args:
        lengths: int [n], 1 to `capacity` each.
        capacity: of a bin.

    Returns:
        The indices of the pieces in each bin.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> bins
    rooms: list[int] = []  # sorted, of which there are bins
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        bins[chosen].append(piece)
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins
