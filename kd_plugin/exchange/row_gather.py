"""The rows of one chunk of every rank: one all-gather for all tensors, under way while the chunk before is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import Pending, all_gather
from kd_plugin.loss.chunk_plan import ChunkPlan

_ALIGNMENT = 16  # bytes; cuBLAS wants rows of matrices aligned so for its fast kernels


class _Field(NamedTuple):
    """Bytes `[start, stop)` of a packed row."""

    tensor: Tensor  # [N, d]
    start: int
    stop: int

    def of(self, packed: Tensor) -> Tensor:
        """`[n, row bytes]` -> a view `[n, d]`."""
        return packed[:, self.start : self.stop].view(self.tensor.dtype)


class RowGather:
    """Rows of several tensors of all ranks, chunk by chunk and one chunk ahead.

    Args:
        plan: the chunks, agreed between the ranks.
        group: the ranks.
        tensors: `[N, d]` each, any dtypes, the same names, dtypes and widths on every rank.
        what: a word for them all, for the message of a failed collective.
    """

    def __init__(
        self, plan: ChunkPlan, group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor], what: str
    ) -> None:
        self._plan, self._group, self._what = plan, group, what
        self._fields: dict[str, _Field] = {}
        end = 0
        for name, tensor in tensors.items():
            size = tensor.shape[1] * tensor.element_size()
            start = _rounded_up(end, _ALIGNMENT if size >= _ALIGNMENT else tensor.element_size())
            end = start + size
            self._fields[name] = _Field(tensor, start, end)
        self.row_bytes = _rounded_up(end, _ALIGNMENT)
        """Bytes that a row takes on the wire."""
        self._ahead = self._ask(0)

    def take(self, index: int) -> dict[str, Tensor]:
        """Chunk `index` of every rank, in rank order: `[W * C, d]` each, rows apart by `row_bytes`; short ranks have
        zeros at their end. Chunks are taken in order. Returns with the next one under way."""
        assert self._ahead is not None
        received, pending = self._ahead
        with self._plan.at(index):
            pending.wait()
        self._ahead = self._ask(index + 1)
        return {name: field.of(received) for name, field in self._fields.items()}

    def _ask(self, index: int) -> tuple[Tensor, Pending] | None:
        if index >= self._plan.num_chunks:
            return None
        rows, count = self._plan.of(index)
        device = next(iter(self._fields.values())).tensor.device
        packed = torch.zeros(self._plan.chunk, self.row_bytes, dtype=torch.uint8, device=device)
        for field in self._fields.values():
            field.of(packed)[:count] = field.tensor[rows]
        with self._plan.at(index):
            return all_gather(packed, self._group, self._what, wait=False)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
