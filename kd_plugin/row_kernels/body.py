"""One chunk of rows: logits in, statistics out, gradient written over the student's logits.

Pure elementwise maths and row sums on `[n, V]`, so that one torch.compile graph serves every chunk. The parts
that touch one column per row (the label's logit, the label's -1 in the gradient) stay with the caller: a
gather inside the graph keeps its loops from being vectorised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences import LOG_FLOOR, Row, Sums
from kd_plugin.objective import Objective, Term

STATISTICS = (
    "soft_loss",
    "hard_loss",
    "teacher_entropy",
    "student_entropy",
    "top1_agreement",
    "acceptance_rate",
    "kl_t1",
)
"""Columns of the statistics that a row kernel returns."""
NUM_LOSSES = 2
"""The first so many of them are losses, the rest metrics."""


class LogitTransform(NamedTuple):
    """What a model does to `hidden @ weight.T + bias`: first the scale, then the soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """`raw` -> logits, same shape; used by every path so that no model's logits differ."""
        logits = raw * self.scale if self.scale != 1.0 else raw
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def jacobian(self, raw: Tensor) -> Tensor | float:
        """d logits / d raw, elementwise."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - torch.tanh(raw * (self.scale / self.softcap)).square())


IDENTITY = LogitTransform()


class RowSpec(NamedTuple):
    """Everything static about a row pass; hashable, one compiled graph each."""

    objective: Objective
    student: LogitTransform = IDENTITY
    teacher: LogitTransform = IDENTITY
    with_gradient: bool = True


class Softmax(NamedTuple):
    """Log-probabilities `[n, V]`, floored, and what normalised them, `[n, 1]` each.

    The maximum is subtracted before the normaliser: the two subtractions round less than one of their sum.
    """

    log_probs: Tensor
    maximum: Tensor
    log_sum: Tensor


def softmax(logits: Tensor) -> Softmax:
    """Of logits `[n, V]`, over the vocabulary."""
    maximum = logits.amax(-1, keepdim=True)
    shifted = logits - maximum
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    return Softmax((shifted - log_sum).clamp_min(LOG_FLOOR), maximum, log_sum)


def _row(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Row:
    s, t = student_logits, teacher_logits
    if temperature != 1.0:
        s, t = s / temperature, t / temperature
    lq, lp = softmax(s).log_probs, softmax(t).log_probs
    return Row(s, t, lq, lp, lq.exp(), lp.exp(), s.shape[-1])


def _row_sum(elements: Tensor) -> Tensor:
    return elements.sum(-1, keepdim=True)


def _term(term: Term, row: Row) -> tuple[Tensor, Sums]:
    sums = tuple(_row_sum(elements) for elements in term.divergence.elements(torch, row))
    return term.divergence.value(torch, sums), sums


def _metrics(row: Row) -> list[Tensor]:
    agree = (row.lq == row.lq.amax(-1, keepdim=True)) & (row.lp == row.lp.amax(-1, keepdim=True))
    return [
        _row_sum(-row.p * row.lp),
        _row_sum(-row.q * row.lq),
        agree.any(-1, keepdim=True).to(row.q.dtype),
        _row_sum(torch.minimum(row.q, row.p)),
        _row_sum(row.p * (row.lp - row.lq) + (row.q - row.p)),
    ]


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32 or fp64, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V] same dtype, raw
    target_logits: Tensor | None,  # [n, 1] the student's raw logit of each row's label
    row_weights: Tensor | None,  # [n, 1] multiplies each row's gradient
) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` of each row, unweighted.

    With `spec.with_gradient`, `student_logits` then holds soft_weight * d soft + hard_weight * d hard with
    respect to the raw logits, short of the label's own `-hard_weight` (see `subtract_labels`).
    """
    objective = spec.objective
    logits = spec.student.apply(student_logits)
    zero = torch.zeros_like(logits[:, :1])
    soft, hard, gradient = zero, zero, None
    rows: dict[float, Row] = {}
    if objective.needs_teacher:
        assert teacher_logits is not None
        others = spec.teacher.apply(teacher_logits)
        temperatures = {term.temperature for term in objective.terms} | ({1.0} if objective.metrics else set())
        rows = {temperature: _row(logits, others, temperature) for temperature in sorted(temperatures)}
        for term in objective.terms:
            row = rows[term.temperature]
            value, sums = _term(term, row)
            soft = soft + term.weight * term.scale * value
            factor = objective.soft_weight * term.weight * term.scale / term.temperature
            part = term.divergence.gradient(torch, row, sums) * factor
            gradient = part if gradient is None else gradient + part
    if objective.hard_weight:
        assert target_logits is not None
        plain = softmax(logits)  # torch.compile merges it with the row's at temperature 1
        hard = plain.log_sum - (spec.student.apply(target_logits) - plain.maximum)
        part = objective.hard_weight * plain.log_probs.exp()
        gradient = part if gradient is None else gradient + part
    measured = _metrics(rows[1.0]) if 1.0 in rows and objective.metrics else [zero] * (len(STATISTICS) - 2)
    if spec.with_gradient:
        assert gradient is not None
        gradient = gradient * spec.student.jacobian(student_logits)
        student_logits.copy_(gradient if row_weights is None else gradient * row_weights)
    return torch.cat([soft, hard, *measured], dim=-1)


def subtract_labels(
    spec: RowSpec,
    gradient: Tensor,  # [n, V], as left by row_pass; changed in place
    targets: Tensor,  # [n, 1] int64
    target_logits: Tensor,  # [n, 1] raw
    row_weights: Tensor | None,  # [n, 1]
) -> None:
    """The one-hot part of the cross-entropy's gradient, `q - onehot(label)`."""
    amount = torch.full_like(target_logits, -spec.objective.hard_weight) * spec.student.jacobian(target_logits)
    gradient.scatter_add_(1, targets, amount if row_weights is None else amount * row_weights)
