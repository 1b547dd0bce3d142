# pyright: strict
"""Teachers whose logits are spread over ranks by token id; each chunk is gathered, none is kept.

`ShardedHeadTeacher` serves data-parallel ranks: every rank holds a vocabulary slice of the teacher's head and has
tokens of its own. Per chunk, the ranks gather each other's teacher hidden states, multiply them with their slices of
the head, and send every rank the logits of its tokens (all-to-all). While a chunk's loss is computed, the next
chunk's logits are already travelling, and the hidden states of the one after.

`ShardedLogits` serves a tensor-parallel teacher: all ranks have the same tokens and a slice of their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import Pending, all_gather, all_gather_object, all_to_all
from kd_plugin.loss.chunk_plan import ChunkPlan
from kd_plugin.loss.matmul import EXACT, Rounding
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.row_kernels.row_pass import LogitTransform


class ShardedHeadTeacher:
    """The teacher of ranks that each have a vocabulary slice of its head, and tokens of their own.

    Args:
        head: this rank's slice `[V_r, E]` of the head, with this rank's hidden states `[N, E]`.
        bounds: first token id of every rank's slice, and the size of the shared vocabulary: W + 1 numbers.
        group: the ranks, in the order of `bounds`.
    """

    def __init__(self, head: HeadTeacher, bounds: list[int], group: dist.ProcessGroup | None) -> None:
        self.head, self.bounds, self.group = head, bounds, group
        self.vocab_size = bounds[-1]
        self.transform = head.transform
        self._rank = dist.get_rank(group)

    def prepare(self, plan: ChunkPlan, vocab_size: int, dtype: torch.dtype, rounding: Rounding = EXACT) -> None:
        """Get ready for the chunks of `plan`, `vocab_size` columns of `dtype` each; the first is then under way."""
        self._plan, self._dtype = plan, dtype
        self._columns = [
            min(stop, vocab_size) - min(start, vocab_size)
            for start, stop in zip(self.bounds, self.bounds[1:], strict=False)
        ]
        self.head.prepare(None, self._columns[self._rank], dtype, rounding)
        self._arriving: tuple[list[Tensor], Tensor, Pending] | None = None
        self._gathering: tuple[Tensor, Pending] | None = None
        self._gather(0)
        self._send(0)

    def logits_into(self, out: Tensor, index: int) -> None:
        """Write the raw logits of chunk `index` into `out` `[n, V]`; returns with the next chunk under way."""
        assert self._arriving is not None
        received, sent, handle = self._arriving
        with self._plan.at(index):
            handle.wait()
        del sent
        self._send(index + 1)
        start = 0
        for piece, columns in zip(received, self._columns, strict=True):
            out[:, start : start + columns] = piece[: out.shape[0]]
            start += columns

    @property
    def held_bytes(self) -> int:
        """Bytes held while the chunks run: a chunk's logits as they came, the next chunk's, and what is sent of it."""
        chunk, sent = self._plan.chunk, len(self._columns) * self._columns[self._rank]
        return self.head.held_bytes + chunk * (2 * sum(self._columns) + sent) * self._dtype.itemsize

    def _gather(self, index: int) -> None:
        """Ask for all ranks' hidden states of chunk `index`."""
        self._gathering = None
        if index < self._plan.num_chunks:
            hidden = self._plan.padded(self.head.hidden, index)
            self._gathering = all_gather(hidden, self.group, "the teacher's hidden states", wait=False)

    def _send(self, index: int) -> None:
        """Multiply chunk `index` with this rank's slice, send the logits off, and ask for the chunk after it."""
        self._arriving = None
        if index >= self._plan.num_chunks:
            return
        assert self._gathering is not None
        hidden, handle = self._gathering
        with self._plan.at(index):
            handle.wait()
        self._gather(index + 1)
        chunk, columns = self._plan.chunk, self._columns[self._rank]
        logits = hidden.new_empty(hidden.shape[0], columns, dtype=self._dtype)
        self.head.multiply_into(logits, hidden)
        sizes = [chunk * count for count in self._columns]
        flat = logits.new_empty(sum(sizes))
        own = [chunk * columns] * len(sizes)
        handle = all_to_all(flat, logits.view(-1), sizes, own, self.group, "the teacher's logits")
        pieces = [part.view(chunk, count) for part, count in zip(torch.split(flat, sizes), self._columns, strict=True)]
        self._arriving = (pieces, logits, handle)


class ShardedLogits:
    """Logits `[N, V_r]` of the same tokens on every rank of `group`, cut by token id in rank order.

    For `DistillHead(...)(hidden, targets, teacher=ShardedLogits(...))`; the ranks have the same rows and targets.

    Args:
        local_slice: `[N, V_r]`, this rank's columns; V_r may differ between ranks, or be 0.
        group: the tensor-parallel ranks; None is the default group.
        widths: V_r of every rank. Without it the ranks ask each other, one collective of objects each time.
        transform: what the teacher does to these logits afterwards (scale, soft-cap).

    Raises:
        ValueError: `local_slice` is not 2-D or no floats, or has another number of rows than the student (when used).
    """

    def __init__(
        self,
        local_slice: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        widths: Sequence[int] | None = None,
        transform: LogitTransform | None = None,
    ) -> None:
        if local_slice.dim() != 2:
            raise ValueError(
                f"ShardedLogits got {tuple(local_slice.shape)}; wanted [rows, columns of this rank]: "
                "flatten batch and sequence, local_slice.flatten(0, -2)"
            )
        if not local_slice.is_floating_point():
            raise ValueError(f"ShardedLogits got {local_slice.dtype}; wanted logits, in floats")
        self.local, self.group = local_slice.detach(), group if group is not None else dist.group.WORLD
        if widths is None:
            widths = all_gather_object(local_slice.shape[1], self.group, "the widths of the slices of logits")
        self._widths = list(widths)
        self.vocab_size = sum(self._widths)
        self.transform = transform or LogitTransform()

    def prepare(self, plan: ChunkPlan, vocab_size: int, dtype: torch.dtype, rounding: Rounding = EXACT) -> None:
        """Get ready for the chunks of `plan`, `vocab_size` columns of `dtype` each; the first is then under way.

        The logits are there already, so nothing is rounded.
        """
        if plan.rows is None and plan.num_rows != self.local.shape[0]:
            raise ValueError(f"ShardedLogits has {self.local.shape[0]} rows, the student {plan.num_rows}")
        self._plan, self._vocab_size = plan, vocab_size
        self._arriving: tuple[Tensor, Pending] | None = None
        self._gather(0)

    @property
    def held_bytes(self) -> int:
        """Bytes held while the chunks run: two chunks' logits as they came, and what is sent of one."""
        item = self.local.element_size()
        return self._plan.chunk * (2 * len(self._widths) + 1) * max(self._widths) * item

    def logits_into(self, out: Tensor, index: int) -> None:
        """Write the raw logits of chunk `index` into `out` `[n, V]`; returns with the next chunk under way."""
        assert self._arriving is not None
        gathered, handle = self._arriving
        with self._plan.at(index):
            handle.wait()
        self._gather(index + 1)
        everyone = gathered.view(len(self._widths), -1, max(self._widths))
        start = 0
        for piece, width in zip(everyone, self._widths, strict=True):
            columns = max(0, min(width, self._vocab_size - start))
            out[:, start : start + columns] = piece[: out.shape[0], :columns]
            start += columns

    def _gather(self, index: int) -> None:
        """Ask for all ranks' columns of chunk `index`, each as wide as the widest."""
        self._arriving = None
        if index >= self._plan.num_chunks:
            return
        own = self._plan.padded(self.local, index)
        missing = max(self._widths) - own.shape[1]
        own = torch.nn.functional.pad(own, (0, missing)).contiguous()
        with self._plan.at(index):
            self._arriving = all_gather(own, self.group, "the teacher's logits", wait=False)
