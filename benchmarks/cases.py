"""One problem of the loss, and its tensors: what every contestant gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.chunk_size import chunk_size_on

IGNORE_INDEX = -100
_BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


@dataclass(frozen=True)
class Case:
    """One problem; everything that a contestant must know."""

    rows: int = 2048
    vocab: int = 49152
    width: int = 576
    teacher_width: int | None = None
    """None: the student's."""
    dtype: str = "float32"
    autocast: bool = False
    """The student in fp32 under bf16 autocast, as Hugging Face's Trainer has it with `bf16=True`; the teacher as is."""
    device: str = "cpu"
    divergence: str = "forward_kl"
    temperature: float = 1.0
    soft_weight: float = 0.5
    hard_weight: float = 0.5
    ignored: float = 0.0
    """Share of the rows that have no label."""
    train: bool = True
    """False: the loss alone, under no_grad."""
    logit_std: float = 3.0
    teacher_noise: float | None = None
    """The teacher is the student plus so much noise in its hidden states; None: an unrelated teacher.

    Where the teacher is wider, its other columns have so much less of a say in its logits.
    """
    metrics: bool = True
    logits_dtype: str = "float32"
    row_kernel: str = "auto"
    loss_memory_mb: float | None = 512.0
    """None: what kd_plugin has for its default."""
    chunk_size: int | None = None
    seed: int = 0

    @property
    def valid(self) -> int:
        """Rows with a label."""
        return self.rows - round(self.rows * self.ignored)

    @property
    def beta(self) -> float:
        """As Liger and TRL count it."""
        return _BETAS[self.divergence]

    def config(self) -> kd.DistillConfig:
        """For kd_plugin."""
        memory = {} if self.loss_memory_mb is None else {"loss_memory_mb": self.loss_memory_mb}
        return kd.DistillConfig(
            divergence=self.divergence,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight,
            ignore_index=IGNORE_INDEX,
            metrics=self.metrics,
            logits_dtype=self.logits_dtype,
            row_kernel=self.row_kernel,
            chunk_size=self.chunk_size or "auto",
            **memory,
        )

    @property
    def chunk(self) -> int:
        """Rows of kd_plugin's chunks."""
        device, dtype = torch.device(self.device), getattr(torch, self.dtype)
        return min(chunk_size_on(self.config(), self.vocab, self.vocab, device, dtype).rows, max(self.valid, 1))


class Tensors(NamedTuple):
    """Inputs of the loss; the student's two get gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D]
    teacher_weight: Tensor  # [V, D]
    targets: Tensor  # [N] int64

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.hidden.grad = self.weight.grad = None

    def first(self, rows: int) -> Tensors:
        """The first so many rows, as leaves of their own; the weights are shared."""
        hidden = self.hidden.detach()[:rows].requires_grad_()
        return Tensors(hidden, self.weight, self.teacher_hidden[:rows], self.teacher_weight, self.targets[:rows])

    def to(self, dtype: torch.dtype) -> Tensors:
        """Fresh leaves with the same values."""
        floats = (t.detach().to(dtype, copy=True) for t in self[:4])
        hidden, weight, *teacher = floats
        return Tensors(hidden.requires_grad_(), weight.requires_grad_(), *teacher, self.targets)


def make_tensors(case: Case) -> Tensors:
    """Logits of standard deviation `logit_std`; on one device the same values for every contestant."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    teacher_width = case.teacher_width or case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    dtype = getattr(torch, case.dtype)
    student_dtype = torch.float32 if case.autocast else dtype

    def weights(width: int, dtype: torch.dtype) -> Tensor:
        return normal(case.vocab, width).mul_(case.logit_std / width**0.5).to(dtype)

    hidden, weight = normal(case.rows, case.width), weights(case.width, student_dtype)
    if case.teacher_noise is None:
        teacher_hidden, teacher_weight = normal(case.rows, teacher_width), weights(teacher_width, dtype)
    else:
        teacher_hidden, teacher_weight = hidden + case.teacher_noise * normal(case.rows, case.width), weight.to(dtype)
        if rest := teacher_width - case.width:
            teacher_hidden = torch.cat([teacher_hidden, normal(case.rows, rest)], 1)
            teacher_weight = torch.cat([teacher_weight, weights(rest, dtype) * case.teacher_noise], 1)
    targets = torch.randint(0, case.vocab, (case.rows,), generator=generator, device=case.device)
    without = torch.randperm(case.rows, generator=generator, device=case.device)[: case.rows - case.valid]
    targets[without] = IGNORE_INDEX
    tensors = Tensors(hidden.to(student_dtype), weight, teacher_hidden.to(dtype), teacher_weight, targets)
    tensors.hidden.requires_grad_()
    tensors.weight.requires_grad_()
    return tensors
