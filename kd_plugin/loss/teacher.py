# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
"""Teachers whose logits this rank can compute alone."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.loss.chunk_plan import ChunkPlan
from kd_plugin.loss.matmul import EXACT, Operand, Rounding, add_bias, mm_into
from kd_plugin.row_kernels.row_pass import LogitTransform


class TeacherSource(Protocol):
    """What the chunk loop asks of a teacher."""

    vocab_size: int
    transform: LogitTransform

    group: dist.ProcessGroup | None
    """Ranks that must ask for the same chunks, because a chunk takes collectives; None: no others."""

    def prepare(self, plan: ChunkPlan, vocab_size: int, dtype: torch.dtype, rounding: Rounding = EXACT) -> None:
        """Make ready for the chunks, once before them: only the first `vocab_size` columns are asked for, in `dtype`.

        `rounding` is what their products may round.
        """
        ...

    def logits_into(self, out: Tensor, index: int) -> None:
        """Write the raw logits of chunk `index` into `out` `[n, V]`; chunks come in order."""
        ...

    @property
    def held_bytes(self) -> int:
        """What it holds while the chunks run, above its inputs."""
        ...


class HeadTeacher:
    """Teacher hidden states times the teacher's own head, multiplied chunk by chunk.

    Args:
        hidden: `[..., E]`; kept as `[N, E]`.
        weight: `[V', E]`, whole.
        bias: `[V']` or None.
        transform: what the teacher does to its raw logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        transform: LogitTransform | None = None,
    ) -> None:
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight, self.bias = weight.detach(), bias
        self.transform = transform or LogitTransform()
        self.vocab_size = weight.shape[0]
        self.group: dist.ProcessGroup | None = None
        self._operand: Operand | None = None

    def prepare(self, plan: ChunkPlan | None, vocab_size: int, dtype: torch.dtype, rounding: Rounding = EXACT) -> None:
        """Copy the head once, where its products need that (`loss.matmul`)."""
        self._plan = plan
        weight, hidden_dtype = self.weight[:vocab_size], self.hidden.dtype
        self._operand = Operand("teacher", weight, dtype, rounding, hidden_dtype=hidden_dtype)
        self._bias = None if self.bias is None else self.bias.detach()[:vocab_size]

    def logits_into(self, out: Tensor, index: int) -> None:
        """Multiply the chunk's hidden states by the head; no collective."""
        assert self._plan is not None
        self.multiply_into(out, self.hidden[self._plan.of(index)[0]])

    @property
    def held_bytes(self) -> int:
        """Bytes of the head's copy in another dtype, 0 where there is none."""
        return 0 if self._operand is None else self._operand.held_bytes

    def multiply_into(self, out: Tensor, hidden: Tensor) -> None:
        """`out[n, V] = hidden[n, E] @ weight.T + bias`, for hidden states from anywhere."""
        assert self._operand is not None
        mm_into(out, hidden, self._operand)
        add_bias(out, self._bias)

    def vocab_slice(self, start: int, stop: int) -> HeadTeacher:
        """A copy of the head's token ids `[start, stop)`, to be kept when the whole is freed."""
        bias = None if self.bias is None else self.bias.detach()[start:stop].clone()
        return HeadTeacher(self.hidden, self.weight[start:stop].clone(), bias, self.transform)

    def reading(self, hidden: Tensor) -> HeadTeacher:
        """The same head on other hidden states `[N, E]`."""
        return HeadTeacher(hidden, self.weight, self.bias, self.transform)


class AfterHead(NamedTuple):
    """What happens between a head and its model's logits: `logits = transform(head(hidden) + bias)`."""

    transform: LogitTransform = LogitTransform()
    bias: Tensor | None = None  # [V] fp32, on the CPU

    def close_to(self, other: AfterHead) -> bool:
        """Whether the same happens."""
        mine, others = ([t.scale, t.softcap or 0.0] for t in (self.transform, other.transform))
        bias, others_bias = (torch.zeros(()) if b is None else b for b in (self.bias, other.bias))
        near = functools.partial(torch.allclose, rtol=1e-4, atol=1e-6)
        return near(torch.tensor(mine), torch.tensor(others)) and near(*torch.broadcast_tensors(bias, others_bias))
