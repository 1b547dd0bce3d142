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

from kd_plugin.divergences.definition import Row
from kd_plugin.divergences.measures import TOP1_AGREEMENT
from kd_plugin.divergences.objective import Objective
from kd_plugin.row_kernels.softmaxes import Softmaxes, Whole, parts_of, row_sum, whole_row
from kd_plugin.row_kernels.statistics import cross_entropy, in_columns, metric_sums


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


def _sorted_pairs(row: Row) -> tuple[Row, Tensor]:
    """Student and teacher probabilities paired in descending order, and what the teacher has left over.

    The shorter vocabulary counts as padded with zeros.
    """
    width = row.q.shape[-1]
    descending = row.p.sort(-1, descending=True).values
    if descending.shape[-1] < width:
        descending = torch.nn.functional.pad(descending, (0, width - descending.shape[-1]))
    order = row.q.argsort(-1, descending=True)
    matched = torch.zeros_like(row.q).scatter_(-1, order, descending[:, :width])
    return row._replace(p=matched), row_sum(descending[:, width:])


def _soft_and_gradient(spec: RowSpec, rows: dict[float, Row], zero: Tensor) -> tuple[Tensor, Tensor | None]:
    """All terms -> value `[n, 1]`, and its gradient `[n, V]` with respect to the logits if it is wanted."""
    value, gradient = zero, None
    for divergence, weight, temperature, scale in spec.objective.terms:
        row = rows[temperature]
        if divergence.sorts:
            row, left_over = _sorted_pairs(row)
            value = value + weight * scale * left_over
        sums = tuple(row_sum(elements) for elements in divergence.elements(torch, row))
        value = value + weight * scale * divergence.value(torch, sums)
        if spec.with_gradient:
            factor = spec.objective.soft_weight * weight * scale / temperature
            part = divergence.gradient(torch, row, sums) * factor
            gradient = part if gradient is None else gradient + part
    return value, gradient


def _agreement(student: Softmaxes, whole: Whole, teacher: Softmaxes) -> Tensor:
    """Whether one token id is the most likely of both models, `[n, 1]` of 0 and 1."""
    # The most likely token's log-probability is log(1 / sum exp(logit - maximum)): no need to look for it again.
    (_, of_student, _), (_, of_teacher, _) = (model.at(1.0) for model in (student, teacher))
    tops = (of_student.log_probs == -of_student.log_sum) & (of_teacher.log_probs == -of_teacher.log_sum)
    agree = tops.any(-1, keepdim=True)
    if len(whole.probs) > 1:
        agree = agree & (of_student.maximum == whole.maximum)
    return agree.to(of_student.log_sum.dtype)


def _metrics(student: Softmaxes, whole: Whole, teacher: Softmaxes, *, sorts: bool) -> dict[str, Tensor]:
    """The metrics by name, `[n, 1]`; to a teacher with fewer columns the student's others have probability 0."""
    metrics = metric_sums(_row(student, teacher, 1.0), whole, sorts=sorts)
    return metrics if sorts else metrics | {TOP1_AGREEMENT: _agreement(student, whole, teacher)}


def write_gradient(
    spec: RowSpec,
    parts: Sequence[Tensor],  # [n, columns] each, raw logits; overwritten
    soft: Tensor | None,  # [n, columns] of the first part
    hard: Sequence[Tensor],  # [n, columns] of each part; none: there is no hard loss
    row_weights: Tensor | None,  # [n, 1]
    hard_weights: Tensor | None = None,  # [n, 1]
) -> None:
    """The two losses' gradients together, with respect to the raw logits. What no loss reaches gets zeros.

    `row_weights` are of both losses, or of the soft loss alone where there are `hard_weights`.
    """
    if hard_weights is not None:
        hard = [gradient * hard_weights for gradient in hard]
        soft = soft if soft is None or row_weights is None else soft * row_weights
        row_weights = None
    for index, part in enumerate(parts):
        terms = [] if index or soft is None else [soft]
        terms += [hard[index]] if hard else []
        gradient = torch.zeros_like(part) if not terms else terms[0] if len(terms) == 1 else terms[0] + terms[1]
        gradient = gradient * spec.student.jacobian(part)
        part.copy_(gradient if row_weights is None else gradient * row_weights)


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32 or fp64, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V'] same dtype, raw; V' <= V unless the objective sorts
    target_logits: Tensor | None,  # [n, 1] the student's raw logit of each row's label
    row_weights: Tensor | None,  # [n, 1] multiplies each row's gradient
    hard_weights: Tensor | None = None,  # [n, 1] that of the hard loss; row_weights then are of the soft loss alone
) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` of each row, unweighted.

    With `spec.with_gradient`, `student_logits` then holds soft_weight * d soft + hard_weight * d hard with
    respect to the raw logits, short of the label's own part of the hard loss (see `subtract_labels`).
    """
    objective = spec.objective
    shared = student_logits.shape[1]
    if objective.needs_teacher and not objective.sorts:
        assert teacher_logits is not None and teacher_logits.shape[1] <= shared
        shared = teacher_logits.shape[1]
    parts = parts_of(student_logits, shared)
    logits, *rest = (spec.student.apply(part) for part in parts)
    temperatures = {term.temperature for term in objective.terms} if objective.needs_teacher else set()
    student, teacher = Softmaxes(logits, temperatures), None
    zero = torch.zeros_like(logits[:, :1])
    values: dict[str, Tensor] = {}
    soft_gradient, hard_gradients = None, []
    if objective.needs_teacher:
        assert teacher_logits is not None
        teacher = Softmaxes(spec.teacher.apply(teacher_logits), temperatures)
        rows = {term.temperature: _row(student, teacher, term.temperature) for term in objective.terms}
        values["soft_loss"], soft_gradient = _soft_and_gradient(spec, rows, zero)
    if objective.measured or objective.hard_weight:
        whole = whole_row(student, rest)
        if objective.measured:
            assert teacher is not None
            values |= _metrics(student, whole, teacher, sorts=objective.sorts)
        if objective.hard_weight:
            assert target_logits is not None
            labels = spec.student.apply(target_logits)
            value, smoothed, hard_gradients = cross_entropy(objective, whole, student_logits.shape[1], labels)
            values["hard_loss"] = value if smoothed is None else value + smoothed
    if spec.with_gradient:
        write_gradient(spec, parts, soft_gradient, hard_gradients, row_weights, hard_weights)
    return in_columns(values, zero)


def subtract_labels(
    spec: RowSpec,
    gradient: Tensor,  # [n, V], as left by row_pass; changed in place
    targets: Tensor,  # [n, 1] int64
    target_logits: Tensor,  # [n, 1] raw
    row_weights: Tensor | None,  # [n, 1], of the hard loss
) -> None:
    """The one-hot part of the cross-entropy's gradient, `q - onehot(label)`."""
    share = -spec.objective.hard_weight * (1 - spec.objective.label_smoothing)
    amount = torch.full_like(target_logits, share) * spec.student.jacobian(target_logits)
    gradient.scatter_add_(1, targets, amount if row_weights is None else amount * row_weights)
