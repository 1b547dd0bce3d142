"""Which rows each chunk takes; agreed between ranks where chunks contain collectives.

A collective inside the chunk loop that one rank runs four times and another three hangs both, or, worse, pairs
chunks that do not belong together. So the number of chunks is settled before the first one, by one all-gather of
the numbers of valid rows, which also says how many rows the mean over all of them has.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import all_gather, host_device, located


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of `chunk` rows; a rank with fewer rows than others has short or empty ones at its end."""

    rows: Tensor | None
    """Flat indices `[n]` of the rows that count; None: the first `num_rows`."""
    num_rows: int
    chunk: int
    num_chunks: int
    group_rows: int | None = None
    """Rows of all ranks that agreed; None where no rank asked another."""

    def of(self, index: int) -> tuple[slice | Tensor, int]:
        """Flat indices of the rows of chunk `index`, and their number."""
        start = min(index * self.chunk, self.num_rows)
        stop = min(start + self.chunk, self.num_rows)
        return (slice(start, stop) if self.rows is None else self.rows[start:stop]), stop - start

    def at(self, index: int) -> AbstractContextManager[None]:
        """Let a failed collective of chunk `index` say this plan in its error."""
        return located(
            lambda: f"chunk {index + 1}/{self.num_chunks} of {self.chunk} rows, {self.num_rows} valid rows here"
        )

    def padded(self, tensor: Tensor, index: int) -> Tensor:
        """The rows of chunk `index` out of `[N, ...]`, filled up with zeros to `[chunk, ...]`."""
        rows, count = self.of(index)
        taken = tensor[rows]
        if count == self.chunk:
            return taken
        return torch.cat([taken, taken.new_zeros(self.chunk - count, *taken.shape[1:])])


def local_plan(rows: Tensor | None, num_rows: int, chunk_size: int) -> ChunkPlan:
    """The plan of this rank alone; no collective."""
    chunk = min(chunk_size, max(num_rows, 1))
    return ChunkPlan(rows, num_rows, chunk, -(-num_rows // chunk))


def agreed_plan(
    rows: Tensor | None, num_rows: int, chunk_size: int, group: dist.ProcessGroup | None, device: torch.device
) -> ChunkPlan:
    """The same number of chunks, of the same length, on every rank of `group`. One all-gather.

    The ranks' least `chunk_size` is taken.
    """
    own = torch.tensor([[num_rows, chunk_size]], device=host_device(group, device))
    with located(lambda: f"{num_rows} valid rows here"):
        counts, sizes = all_gather(own, group, "counts of valid rows").t().tolist()
    most = max(counts)
    chunk = min(*sizes, max(most, 1))
    return ChunkPlan(rows, num_rows, chunk, -(-most // chunk), sum(counts))
