"""Dense fp64 oracle of the loss, written from the textbook formulas row by row; shares no code with kd_plugin.

Probabilities are formed and summed as the formulas say, and gradients come from autograd in fp64. It is slow and
holds everything, which is what an oracle may do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd")


@dataclass
class Expected:
    """What a loss call should give; `loss` is differentiable."""

    loss: Tensor
    soft: float
    hard: float
    num_valid: int
    metrics: dict[str, float] = field(default_factory=dict)


def log_probs(logits: Tensor) -> Tensor:
    """`[V]` -> log-probabilities."""
    return logits - torch.logsumexp(logits, dim=0)


def divergence(name: str, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """One row: logits `[V]` already divided by the temperature -> value. q is the student, p the teacher."""
    log_q, log_p = log_probs(student), log_probs(teacher)
    q, p = log_q.exp(), log_p.exp()
    support = p > 0  # 0 log 0 = 0
    if name == "forward_kl":
        return (p * (log_p - log_q))[support].sum()
    if name == "soft_ce":
        return -(p * log_q)[support].sum()
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        from_teacher = (p * (log_p - m.log()))[support].sum()
        return beta * from_teacher + (1 - beta) * (q * (log_q - m.log())).sum()
    raise NotImplementedError(name)


def measurements(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """One row's metrics, at temperature 1."""
    q, p = log_probs(student).exp(), log_probs(teacher).exp()
    return {
        "teacher_entropy": -(p * p.log()).sum(),
        "student_entropy": -(q * q.log()).sum(),
        "top1_agreement": (q.argmax() == p.argmax()).double(),
        "acceptance_rate": 1 - (q - p).abs().sum() / 2,
        "kl_t1": (p * (p.log() - q.log())).sum(),
    }


def distill_logits(
    student: Tensor,  # [N, V]
    teacher: Tensor | None,  # [N, V']
    targets: Tensor | None,  # [N]
    config: Any,
    *,
    num_items: float | None = None,
    token_weights: Tensor | None = None,  # [N]
) -> Expected:
    """The objective of `config` on logits, in fp64."""
    student = student.double()
    columns = student.shape[1]
    if config.soft_weight:
        assert teacher is not None
        teacher = teacher.detach().double()
        columns = min(columns, teacher.shape[1])
    rows = [i for i in range(len(student)) if targets is None or int(targets[i]) != config.ignore_index]
    soft = hard = student.new_zeros(())
    sums: dict[str, Tensor] = {}
    for i in rows:
        z = student[i, :columns]
        weight = 1.0 if token_weights is None else token_weights[i].double()
        if config.soft_weight:
            t = teacher[i, :columns]
            value = divergence(config.divergence, z / config.temperature, t / config.temperature, config.beta)
            soft = soft + weight * config.temperature**config.temperature_power * value
            for name, measured in measurements(z.detach(), t).items():
                sums[name] = sums.get(name, 0.0) + measured
        if config.hard_weight:
            hard = hard - weight * log_probs(z)[targets[i]]
    items = max(len(rows), 1) if num_items is None else num_items
    soft, hard = soft / items, hard / items
    loss = config.soft_weight * soft + config.hard_weight * hard
    if not rows:
        loss = loss + 0.0 * student[:0].sum()
    metrics = {name: total.item() / len(rows) for name, total in sums.items()}
    return Expected(loss, soft.item(), hard.item(), len(rows), metrics)


@dataclass
class Problem:
    """Inputs of `distill_loss` with odd sizes; `tensors()` in order, `leaves` those that want gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, E]
    teacher_weight: Tensor  # [V', E]
    targets: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    teacher_bias: Tensor | None = None  # [V']

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.targets))

    @property
    def leaves(self) -> list[Tensor]:
        """Whatever requires a gradient among hidden, weight and bias."""
        tensors = (self.hidden, self.weight, self.bias)
        return [t for t in tensors if t is not None and t.requires_grad]

    @property
    def biases(self) -> dict[str, Tensor]:
        """Keyword arguments of `distill_loss`."""
        pairs = (("student_bias", self.bias), ("teacher_bias", self.teacher_bias))
        return {name: bias for name, bias in pairs if bias is not None}

    def expected(self, config: Any, **options: Any) -> Expected:
        """Of the inputs as they are, upcast; use `gradients` on its loss."""
        student = self.hidden.double() @ self.weight.double().T
        teacher = self.teacher_hidden.double() @ self.teacher_weight.double().T
        if self.bias is not None:
            student = student + self.bias.double()
        if self.teacher_bias is not None:
            teacher = teacher + self.teacher_bias.double()
        return distill_logits(student, teacher, self.targets, config, **options)


def make_problem(
    rows: int = 13,
    width: int = 5,
    teacher_width: int = 7,
    vocab: int = 11,
    teacher_vocab: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    ignored: tuple[int, ...] = (1, 5, 6, 12),
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    """Random signed inputs; the label of every row in `ignored` is -100."""
    generator = torch.Generator().manual_seed(seed)
    shared = min(vocab, teacher_vocab or vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, shared, (rows,), generator=generator)
    targets[list(ignored)] = -100
    problem = Problem(
        normal(rows, width).requires_grad_(),
        normal(vocab, width).requires_grad_(),
        normal(rows, teacher_width),
        normal(teacher_vocab or vocab, teacher_width),
        targets,
    )
    if bias:
        problem.bias = normal(vocab).requires_grad_()
        problem.teacher_bias = normal(teacher_vocab or vocab)
    return problem


def gradients(loss: Tensor, leaves: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Of `scale * loss`, as `loss.backward(scale)` would leave them."""
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; absolute where the wanted value is zero."""
    difference = (found.double() - wanted.double()).norm()
    size = wanted.double().norm()
    return float(difference / size if size > 0 else difference)


def chunk_sizes(rows: int) -> list[int]:
    """Sizes that divide `rows`, that do not, that leave one row over, and that hold all."""
    return sorted({1, 3, 4, rows - 1, rows, rows + 50})
