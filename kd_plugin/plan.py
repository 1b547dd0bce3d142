"""Which rows each chunk takes; agreed between ranks where chunks contain collectives.

A collective inside the chunk loop that one rank runs four times and another three hangs both, or, worse, pairs
chunks that do not belong together. So the number of chunks is settled before the first one, by one all-gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of `chunk` rows; a rank with fewer rows than others has short or empty ones at its end."""

    rows: Tensor | None
    """Flat indices `[n]` of the rows that count; None: the first `num_rows`."""
    num_rows: int
    chunk: int
    num_chunks: int

    def of(self, index: int) -> tuple[slice | Tensor, int]:
        """Flat indices of the rows of chunk `index`, and their number."""
        start = min(index * self.chunk, self.num_rows)
        stop = min(start + self.chunk, self.num_rows)
        return (slice(start, stop) if self.rows is None else self.rows[start:stop]), stop - start

    def padded(self, tensor: Tensor, index: int) -> Tensor:
        """The rows of chunk `index` out of `[N, ...]`, filled up with zeros to `[chunk, ...]`."""
        rows, count = self.of(index)
        taken = tensor[rows]
        if count == self.chunk:
            return taken
        return torch.cat([taken, taken.new_zeros(self.chunk - count, *taken.shape[1:])])


def local_plan(rows: Tensor | None, num_rows: int, chunk_size: int) -> ChunkPlan:
    """This rank's own; no collective."""
    chunk = min(chunk_size, max(num_rows, 1))
    return ChunkPlan(rows, num_rows, chunk, -(-num_rows // chunk))


def agreed_plan(rows: Tensor | None, num_rows: int, chunk_size: int, group: Any, device: torch.device) -> ChunkPlan:
    """The same number of chunks, of the same length, on every rank of `group`. One all-gather."""
    counts = all_gather(torch.tensor([num_rows], device=device), group)
    most = int(counts.max())
    chunk = min(chunk_size, max(most, 1))
    return ChunkPlan(rows, num_rows, chunk, -(-most // chunk))


def all_gather(tensor: Tensor, group: Any, *, wait: bool = True) -> Any:
    """`[n, ...]` of every rank -> `[W * n, ...]`; with `wait=False` also the handle to wait for."""
    out = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    handle = gather(out, tensor.contiguous(), group=group, async_op=not wait)
    return out if wait else (out, handle)


def reduce_scatter(tensor: Tensor, group: Any) -> Tensor:
    """Sum of `[W * n, ...]` over ranks -> this rank's `[n, ...]`."""
    out = tensor.new_empty(tensor.shape[0] // dist.get_world_size(group), *tensor.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    scatter(out, tensor, group=group)
    return out
