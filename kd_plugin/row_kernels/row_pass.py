"""One chunk of rows: logits in, statistics out, gradient written over the student's logits.

Pure elementwise maths and row sums on `[n, V]`, so that one torch.compile graph serves every chunk. The parts
that touch one column per row (the label's logit, the label's -1 in the gradient) stay with the caller: a
gather inside the graph keeps its loops from being vectorised.

A student may have more columns than its teacher: the soft loss takes those that both have, the hard loss and the
student's side of the metrics take all (see `softmaxes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences.objective import MEASURED, Objective
from kd_plugin.divergences.registry import Row
from kd_plugin.row_kernels.softmaxes import Softmaxes, Whole, parts_of, row_mean, row_sum, whole_row

STATISTICS = ("soft_loss", "hard_loss", *MEASURED)
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


def _row(student: Softmaxes, teacher: Softmaxes, temperature: float) -> Row:
    (s, of_student, q), (t, of_teacher, p) = student.at(temperature), teacher.at(temperature)
    return Row(s, t, of_student.log_probs, of_teacher.log_probs, q, p, s.shape[-1])


def _match_by_rank(row: Row) -> tuple[Row, Tensor]:
    """Each student probability paired with the teacher's of the same rank, and what the teacher has left over.

    The shorter vocabulary counts as padded with zeros.
    """
    width = row.q.shape[-1]
    descending = row.p.sort(-1, descending=True).values
    if descending.shape[-1] < width:
        descending = torch.nn.functional.pad(descending, (0, width - descending.shape[-1]))
    order = row.q.argsort(-1, descending=True)
    matched = torch.zeros_like(row.q).scatter_(-1, order, descending[:, :width])
    return row._replace(p=matched), row_sum(descending[:, width:])


def _soft(spec: RowSpec, rows: dict[float, Row], zero: Tensor) -> tuple[Tensor, Tensor | None]:
    """All terms -> value `[n, 1]`, and its gradient `[n, V]` with respect to the logits if it is wanted."""
    value, gradient = zero, None
    for divergence, weight, temperature, scale in spec.objective.terms:
        row = rows[temperature]
        if divergence.match_by_rank:
            row, left_over = _match_by_rank(row)
            value = value + weight * scale * left_over
        sums = tuple(row_sum(elements) for elements in divergence.elements(torch, row))
        value = value + weight * scale * divergence.value(torch, sums)
        if spec.with_gradient:
            factor = spec.objective.soft_weight * weight * scale / temperature
            part = divergence.gradient(torch, row, sums) * factor
            gradient = part if gradient is None else gradient + part
    return value, gradient


def _hard(spec: RowSpec, student: Whole, target_logits: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Cross-entropy (smoothed) and z-loss -> value `[n, 1]`, gradient of each part short of the label's own."""
    objective = spec.objective
    smoothing = objective.label_smoothing
    value = student.log_sum - (spec.student.apply(target_logits) - student.maximum)
    gradients = list(student.probs)
    if smoothing:
        value = (1 - smoothing) * value - smoothing * row_mean(student.log_probs)
        size = sum(part.shape[-1] for part in student.probs)
        gradients = [gradient - smoothing / size for gradient in gradients]
    if objective.z_loss_weight:
        lse = student.maximum + student.log_sum
        value = value + objective.z_loss_weight * lse.square()
        slope = (2 * objective.z_loss_weight) * lse
        gradients = [gradient + slope * q for gradient, q in zip(gradients, student.probs, strict=True)]
    return value, [objective.hard_weight * gradient for gradient in gradients]


def _metrics(student: Softmaxes, whole: Whole, teacher: Softmaxes, zero: Tensor, by_rank: bool) -> list[Tensor]:
    """Of the student's whole distribution, to which a teacher with fewer columns gives probability 0 in the others."""
    row = _row(student, teacher, 1.0)
    lq, (q, *rest) = whole.log_probs[0], whole.probs
    terms = (-q * lq for q, lq in zip(whole.probs, whole.log_probs, strict=True))
    entropies = [row_sum(-row.p * row.lp), row_sum(*terms)]
    if by_rank:  # token ids do not correspond
        return [*entropies, zero, zero, zero]
    # The most likely token's log-probability is log(1 / sum exp(logit - maximum)): no need to look for it again.
    best_q, best_p = (-model.at(1.0)[1].log_sum for model in (student, teacher))
    agree = ((row.lq == best_q) & (row.lp == best_p)).any(-1, keepdim=True)
    if rest:
        agree = agree & (student.at(1.0)[1].maximum == whole.maximum)
    measured = [*entropies, agree.to(q.dtype), row_sum(torch.minimum(q, row.p))]
    return [*measured, row_sum(row.p * (row.lp - lq) + (q - row.p), *rest)]


def write_gradient(
    spec: RowSpec,
    parts: Sequence[Tensor],  # [n, columns] each, raw logits; overwritten
    soft: Tensor | None,  # [n, columns] of the first part
    hard: Sequence[Tensor],  # [n, columns] of each part; none: there is no hard loss
    row_weights: Tensor | None,  # [n, 1]
) -> None:
    """The two losses' gradients together, with respect to the raw logits. What no loss reaches gets zeros."""
    for index, part in enumerate(parts):
        terms = [] if index or soft is None else [soft]
        terms += [hard[index]] if hard else []
        gradient = torch.zeros_like(part) if not terms else terms[0] if len(terms) == 1 else terms[0] + terms[1]
        gradient = gradient * spec.student.jacobian(part)
        part.copy_(gradient if row_weights is None else gradient * row_weights)


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32 or fp64, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V'] same dtype, raw; V' <= V unless paired by rank
    target_logits: Tensor | None,  # [n, 1] the student's raw logit of each row's label
    row_weights: Tensor | None,  # [n, 1] multiplies each row's gradient
) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` of each row, unweighted.

    With `spec.with_gradient`, `student_logits` then holds soft_weight * d soft + hard_weight * d hard with
    respect to the raw logits, short of the label's own part of the hard loss (see `subtract_labels`).
    """
    objective = spec.objective
    shared = student_logits.shape[1]
    if objective.needs_teacher and not objective.by_rank:
        assert teacher_logits is not None and teacher_logits.shape[1] <= shared
        shared = teacher_logits.shape[1]
    parts = parts_of(student_logits, shared)
    logits, *rest = (spec.student.apply(part) for part in parts)
    temperatures = {term.temperature for term in objective.terms} if objective.needs_teacher else set()
    student = Softmaxes(logits, temperatures)
    zero = torch.zeros_like(logits[:, :1])
    soft, hard, teacher = zero, zero, None
    soft_gradient, hard_gradients = None, []
    measured = [zero] * (len(STATISTICS) - NUM_LOSSES)
    if objective.needs_teacher:
        assert teacher_logits is not None
        teacher = Softmaxes(spec.teacher.apply(teacher_logits), temperatures)
        rows = {term.temperature: _row(student, teacher, term.temperature) for term in objective.terms}
        soft, soft_gradient = _soft(spec, rows, zero)
    if objective.measured or objective.hard_weight:
        whole = whole_row(student, rest)
        if objective.measured:
            assert teacher is not None
            measured = _metrics(student, whole, teacher, zero, objective.by_rank)
        if objective.hard_weight:
            assert target_logits is not None
            hard, hard_gradients = _hard(spec, whole, target_logits)
    if spec.with_gradient:
        write_gradient(spec, parts, soft_gradient, hard_gradients, row_weights)
    return torch.cat([soft, hard, *measured], dim=-1)


def subtract_labels(
    spec: RowSpec,
    gradient: Tensor,  # [n, V], as left by row_pass; changed in place
    targets: Tensor,  # [n, 1] int64
    target_logits: Tensor,  # [n, 1] raw
    row_weights: Tensor | None,  # [n, 1]
) -> None:
    """The one-hot part of the cross-entropy's gradient, `q - onehot(label)`."""
    share = -spec.objective.hard_weight * (1 - spec.objective.label_smoothing)
    amount = torch.full_like(target_logits, share) * spec.student.jacobian(target_logits)
    gradient.scatter_add_(1, targets, amount if row_weights is None else amount * row_weights)
