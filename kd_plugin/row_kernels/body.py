"""One chunk of rows: logits in, statistics out, gradient written over the student's logits.

Pure elementwise maths and row sums on `[n, V]`, so that one torch.compile graph serves every chunk. The parts
that touch one column per row (the label's logit, the label's -1 in the gradient) stay with the caller: a
gather inside the graph keeps its loops from being vectorised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences import LOG_FLOOR, Row
from kd_plugin.objective import MEASURED, Objective

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


class _Softmaxes:
    """Of one model's logits `[n, V]`, each temperature's computed once: torch.compile does not merge repetitions."""

    def __init__(self, logits: Tensor, temperatures: set[float]) -> None:
        self._logits = logits
        self._known: dict[float, tuple[Tensor, Softmax, Tensor]] = {}
        # exp(x) = exp(x / 2) ** 2, and dividing by a power of two is exact. On a CPU exponentials take most of the
        # time; elsewhere memory does.
        usable = sorted(temperatures & {2.0, 4.0}) if logits.is_cpu else []
        self._root = usable[0] if usable else None

    def at(self, temperature: float) -> tuple[Tensor, Softmax, Tensor]:
        """Logits divided by the temperature, their softmax, and the probabilities `[n, V]`."""
        if temperature not in self._known:
            shared = temperature == 1.0 and self._root is not None
            self._known[temperature] = self._power() if shared else self._plain(temperature)
        return self._known[temperature]

    def _plain(self, temperature: float) -> tuple[Tensor, Softmax, Tensor]:
        scaled = self._logits / temperature if temperature != 1.0 else self._logits
        found = softmax(scaled)
        if temperature == self._root:  # by the exponentials that `_power` reads, too
            return scaled, found, (scaled - found.maximum).exp() / found.log_sum.exp()
        return scaled, found, found.log_probs.exp()

    def _power(self) -> tuple[Tensor, Softmax, Tensor]:
        """Temperature 1 from the exponentials of another."""
        assert self._root is not None
        scaled, (_, maximum, _), _ = self.at(self._root)
        shifted = scaled - maximum
        power = shifted.exp().square()
        if self._root == 4.0:
            power = power.square()
        total = power.sum(-1, keepdim=True)
        log_sum = total.log()
        log_probs = (shifted * self._root - log_sum).clamp_min(LOG_FLOOR)
        return self._logits, Softmax(log_probs, maximum * self._root, log_sum), power / total


def _row(student: _Softmaxes, teacher: _Softmaxes, temperature: float) -> Row:
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
    return row._replace(p=matched), _row_sum(descending[:, width:])


def _row_sum(elements: Tensor) -> Tensor:
    return elements.sum(-1, keepdim=True)


def _soft(spec: RowSpec, rows: dict[float, Row], zero: Tensor) -> tuple[Tensor, Tensor | None]:
    """All terms -> value `[n, 1]`, and its gradient `[n, V]` with respect to the logits if it is wanted."""
    value, gradient = zero, None
    for divergence, weight, temperature, scale in spec.objective.terms:
        row = rows[temperature]
        if divergence.match_by_rank:
            row, left_over = _match_by_rank(row)
            value = value + weight * scale * left_over
        sums = tuple(_row_sum(elements) for elements in divergence.elements(torch, row))
        value = value + weight * scale * divergence.value(torch, sums)
        if spec.with_gradient:
            factor = spec.objective.soft_weight * weight * scale / temperature
            part = divergence.gradient(torch, row, sums) * factor
            gradient = part if gradient is None else gradient + part
    return value, gradient


def _hard(spec: RowSpec, student: _Softmaxes, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (smoothed) and z-loss -> value `[n, 1]`, gradient `[n, V]` short of the label's part."""
    objective = spec.objective
    logits, plain, q = student.at(1.0)
    smoothing = objective.label_smoothing
    value = plain.log_sum - (spec.student.apply(target_logits) - plain.maximum)
    gradient = q
    if smoothing:
        value = (1 - smoothing) * value - smoothing * plain.log_probs.mean(-1, keepdim=True)
        gradient = gradient - smoothing / logits.shape[-1]
    if objective.z_loss_weight:
        lse = plain.maximum + plain.log_sum
        value = value + objective.z_loss_weight * lse.square()
        gradient = gradient + (2 * objective.z_loss_weight) * lse * q
    return value, objective.hard_weight * gradient


def _metrics(student: _Softmaxes, teacher: _Softmaxes, zero: Tensor, by_rank: bool) -> list[Tensor]:
    row = _row(student, teacher, 1.0)
    entropies = [_row_sum(-row.p * row.lp), _row_sum(-row.q * row.lq)]
    if by_rank:  # token ids do not correspond
        return [*entropies, zero, zero, zero]
    # The most likely token's log-probability is log(1 / sum exp(logit - maximum)): no need to look for it again.
    best_q, best_p = (-model.at(1.0)[1].log_sum for model in (student, teacher))
    agree = (row.lq == best_q) & (row.lp == best_p)
    return [
        *entropies,
        agree.any(-1, keepdim=True).to(row.q.dtype),
        _row_sum(torch.minimum(row.q, row.p)),
        _row_sum(row.p * (row.lp - row.lq) + (row.q - row.p)),
    ]


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32 or fp64, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V] same dtype, raw; another width only when paired by rank
    target_logits: Tensor | None,  # [n, 1] the student's raw logit of each row's label
    row_weights: Tensor | None,  # [n, 1] multiplies each row's gradient
) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` of each row, unweighted.

    With `spec.with_gradient`, `student_logits` then holds soft_weight * d soft + hard_weight * d hard with
    respect to the raw logits, short of the label's own part of the hard loss (see `subtract_labels`).
    """
    objective = spec.objective
    logits = spec.student.apply(student_logits)
    temperatures = {term.temperature for term in objective.terms} if objective.needs_teacher else set()
    student = _Softmaxes(logits, temperatures)
    zero = torch.zeros_like(logits[:, :1])
    soft, hard, gradient = zero, zero, None
    measured = [zero] * (len(STATISTICS) - NUM_LOSSES)
    if objective.needs_teacher:
        assert teacher_logits is not None
        teacher = _Softmaxes(spec.teacher.apply(teacher_logits), temperatures)
        rows = {term.temperature: _row(student, teacher, term.temperature) for term in objective.terms}
        soft, gradient = _soft(spec, rows, zero)
        if objective.metrics:
            measured = _metrics(student, teacher, zero, objective.by_rank)
    if objective.hard_weight:
        assert target_logits is not None
        hard, part = _hard(spec, student, target_logits)
        gradient = part if gradient is None else gradient + part
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
    share = -spec.objective.hard_weight * (1 - spec.objective.label_smoothing)
    amount = torch.full_like(target_logits, share) * spec.student.jacobian(target_logits)
    gradient.scatter_add_(1, targets, amount if row_weights is None else amount * row_weights)
