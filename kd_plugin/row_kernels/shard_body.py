"""The row pass cut where ranks must talk: each rank holds some columns (token ids) of every row.

    moments (local maximum and sum of exponentials)   -> exchanged and merged: the softmax of the whole row
    sums (local sums of the definitions' elements)    -> added over ranks, for gradients that read them
    finish (local columns of the gradient, local parts of the statistics)

Three pure functions on `[n, V/W]`, so that each compiles to one graph; what travels between them is a few
numbers per row. The middle part, and with it the second round of the exchange, is needed by few divergences:
- a gradient such as `q - p` reads no sum, and values that are sums need not be known row by row: the ranks add
  up what they have of them, and exchange their totals once, after the last chunk;
- KL(q||p) obeys the chain rule: it is the KL of the ranks' masses plus each rank's KL of its own softmaxes
  weighted by its mass, so it travels with the moments. All its terms are >= 0, so nothing cancels.

Formulas: log-sum-exp merging of partial softmaxes, as in online softmax (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_plugin.divergences import LOG_FLOOR, Row
from kd_plugin.divergences.definition import TINY
from kd_plugin.objective import Objective, Term
from kd_plugin.row_kernels.body import RowSpec


def student_temperatures(objective: Objective) -> tuple[float, ...]:
    """Temperatures at which the student's softmax is needed, ascending."""
    found = {term.temperature for term in _terms(objective)}
    if objective.hard_weight or objective.measured:
        found.add(1.0)
    return tuple(sorted(found))


def teacher_temperatures(objective: Objective) -> tuple[float, ...]:
    """Likewise, the teacher's."""
    return tuple(sorted({term.temperature for term in _terms(objective)} | ({1.0} if objective.measured else set())))


def _terms(objective: Objective) -> tuple[Term, ...]:
    return objective.terms if objective.needs_teacher else ()


def _chained(objective: Objective) -> list[Term]:
    return [term for term in _terms(objective) if term.divergence.chain_rule]


def _summed(objective: Objective) -> list[Term]:
    """Terms whose sums take a round of their own."""
    about = ((term, term.divergence) for term in _terms(objective))
    return [term for term, divergence in about if not (divergence.chain_rule or divergence.gradient_without_sums)]


def has_sums(objective: Objective) -> bool:
    """Whether there is a second round."""
    return bool(_summed(objective))


def exchanged_numbers(objective: Objective) -> tuple[int, int]:
    """Per row: numbers that every rank gathers from all (with the label's logit), and sums added over ranks."""
    one = torch.zeros(1, 1)
    row = Row(one, one, one, one, one, one, 1)
    softmaxes = len(student_temperatures(objective)) + len(teacher_temperatures(objective))
    others = bool(objective.measured) + bool(objective.hard_weight) + len(_chained(objective))
    return 2 * softmaxes + others, sum(len(t.divergence.elements(torch, row)) for t in _summed(objective))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def shard_moments(spec: RowSpec, vocab_size: int, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """`[n, M]` of this rank's columns.

    Maximum and sum of exponentials of each softmax, student's first; whether one column is the maximum of both
    models; the values of the divergences that obey the chain rule, of the softmaxes over these columns alone.
    """
    objective, columns = spec.objective, []
    students = {t: _tempered(spec.student.apply(student_logits), t) for t in student_temperatures(objective)}
    teachers: dict[float, Tensor] = {}
    if teacher_logits is not None:
        teachers = {t: _tempered(spec.teacher.apply(teacher_logits), t) for t in teacher_temperatures(objective)}
    for logits in (*students.values(), *teachers.values()):
        # a shard of nothing but -inf (padding, masked ids) has no mass, not NaN
        shift = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
        columns += [shift, (logits - shift).exp().sum(-1, keepdim=True)]
    pairs = list(zip(columns[0::2], columns[1::2], strict=True))
    of_student = dict(zip(students, pairs, strict=False))
    of_teacher = dict(zip(teachers, pairs[len(students) :], strict=False))
    if objective.measured:
        best = (students[1.0] == of_student[1.0][0]) & (teachers[1.0] == of_teacher[1.0][0])
        columns.append(best.any(-1, keepdim=True).to(student_logits.dtype))
    for term in _chained(objective):
        t = term.temperature
        row = _normalised(students[t], teachers[t], _logs(of_student[t]), _logs(of_teacher[t]), vocab_size)
        columns += [e.sum(-1, keepdim=True) for e in term.divergence.elements(torch, row)]
    return torch.cat(columns, -1)


def _logs(moment: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return moment[0], moment[1].clamp_min(TINY).log()


def _normalised(s: Tensor, t: Tensor, of_s: tuple[Tensor, Tensor], of_t: tuple[Tensor, Tensor], size: int) -> Row:
    """`of_s`, `of_t`: maximum and log-sum `[n, 1]`."""
    lq, lp = (((x - m) - log_sum).clamp_min(LOG_FLOOR) for x, (m, log_sum) in ((s, of_s), (t, of_t)))
    return Row(s, t, lq, lp, lq.exp(), lp.exp(), size)


def no_moments(spec: RowSpec, student_logits: Tensor) -> Tensor:
    """Of a rank without columns: `[n, M]` that change nothing when merged."""
    objective, rows = spec.objective, student_logits.shape[0]
    count = len(student_temperatures(objective)) + len(teacher_temperatures(objective))
    lowest = student_logits.new_full((rows, count), torch.finfo(student_logits.dtype).min)
    others = student_logits.new_zeros(rows, bool(objective.measured) + len(_chained(objective)))
    return torch.cat([torch.stack([lowest, torch.zeros_like(lowest)], -1).flatten(-2), others], -1)


def merge_moments(spec: RowSpec, gathered: Tensor) -> Tensor:
    """`[W, n, M]` of all ranks -> `[n, M]` of the whole rows, with *logarithms* of the sums of exponentials.

    With a hard loss, one more column on both sides: the label's logit, 0 except from its owner.
    """
    objective = spec.objective
    of_student, of_teacher = student_temperatures(objective), teacher_temperatures(objective)
    end = 2 * (len(of_student) + len(of_teacher))
    maxima, sums = gathered[..., 0:end:2], gathered[..., 1:end:2]
    maximum = maxima.amax(0)
    log_sum = (sums * (maxima - maximum).exp()).sum(0).log()
    merged = [torch.stack([maximum, log_sum], -1).flatten(-2)]
    others = iter(gathered[..., end:].split(1, -1))

    def both(temperature: float) -> list[int]:
        return [of_student.index(temperature), len(of_student) + of_teacher.index(temperature)]

    if objective.measured:
        chosen = both(1.0)
        at_the_top = (maxima[..., chosen] == maximum[:, chosen]).all(-1, keepdim=True)
        merged.append((next(others) * at_the_top).amax(0))
    log_masses = torch.where(sums > 0, ((maxima - maximum) + sums.log()) - log_sum, 0.0)
    masses = torch.where(sums > 0, log_masses.exp(), 0.0)
    for term in _chained(objective):
        s, t = both(term.temperature)
        lq, lp, q, p = (x[..., i, None] for x in (log_masses, masses) for i in (s, t))
        between = term.divergence.elements(torch, Row(lq, lp, lq, lp, q, p, gathered.shape[0]))[0]
        merged.append((between + q * next(others)).sum(0))
    return torch.cat([*merged, *(column.sum(0) for column in others)], -1)


class _Rows:
    """The rows of one chunk at each temperature, normalised over all ranks' columns."""

    def __init__(
        self, spec: RowSpec, student_logits: Tensor, teacher_logits: Tensor | None, merged: Tensor, size: int
    ) -> None:
        objective = spec.objective
        of_student, of_teacher = student_temperatures(objective), teacher_temperatures(objective)
        columns = merged.split(1, -1)
        pairs = list(zip(columns[0::2], columns[1::2], strict=False))
        self.student = dict(zip(of_student, pairs, strict=False))
        self.others = list(columns[2 * (len(of_student) + len(of_teacher)) :])
        self.logits = spec.student.apply(student_logits)
        self.rows: dict[float, Row] = {}
        if teacher_logits is not None:
            others = spec.teacher.apply(teacher_logits)
            for t, moment in zip(of_teacher, pairs[len(of_student) :], strict=False):
                s_t, t_t = _tempered(self.logits, t), _tempered(others, t)
                self.rows[t] = _normalised(s_t, t_t, self.student[t], moment, size)

    def log_q(self) -> Tensor:
        """The student's at temperature 1."""
        if 1.0 in self.rows:
            return self.rows[1.0].lq
        maximum, log_sum = self.student[1.0]
        return ((self.logits - maximum) - log_sum).clamp_min(LOG_FLOOR)


def _sum(elements: Tensor) -> Tensor:
    return elements.sum(-1, keepdim=True)


def shard_sums(
    spec: RowSpec,
    vocab_size: int,
    student_logits: Tensor,  # [n, V_r]
    teacher_logits: Tensor | None,  # [n, V_r]
    merged: Tensor,  # [n, M]
) -> Tensor:
    """`[n, S]`: this rank's part of every sum that a gradient reads."""
    rows = _Rows(spec, student_logits, teacher_logits, merged, vocab_size).rows
    found = (t.divergence.elements(torch, rows[t.temperature]) for t in _summed(spec.objective))
    return torch.cat([_sum(element) for elements in found for element in elements], -1)


def shard_finish(
    spec: RowSpec,
    vocab_size: int,
    student_logits: Tensor,  # [n, V_r]; overwritten with the gradient of this rank's columns
    teacher_logits: Tensor | None,
    row_weights: Tensor | None,  # [n, 1]
    merged: Tensor,  # [n, M]
    sums: Tensor,  # [n, S], added over ranks
) -> Tensor:
    """`[n, 2 * len(STATISTICS)]`: what is known of each whole row, then what these columns add; one holds zeros
    where the other does not. The gradient is that of `row_pass`."""
    objective = spec.objective
    rows = _Rows(spec, student_logits, teacher_logits, merged, vocab_size)
    zero = merged.new_zeros(merged.shape[0], 1)
    agreement = rows.others.pop(0) if objective.measured else zero
    soft, soft_part, gradient = _soft(spec, rows, sums.split(1, -1) if sums.shape[-1] else (), zero)
    hard, hard_part = zero, zero
    if objective.hard_weight:
        hard, hard_part, of_hard = _hard(spec, rows, vocab_size)
        gradient = of_hard if gradient is None else gradient + of_hard
    if spec.with_gradient:
        assert gradient is not None
        gradient = gradient * spec.student.jacobian(student_logits)
        student_logits.copy_(gradient if row_weights is None else gradient * row_weights)
    parts = [zero, zero, zero, zero]
    if objective.measured:
        x = rows.rows[1.0]
        elements = (-x.p * x.lp, -x.q * x.lq, torch.minimum(x.q, x.p), x.p * (x.lp - x.lq) + (x.q - x.p))
        parts = [_sum(e) for e in elements]
    whole = (soft, hard, zero, zero, agreement, zero, zero)
    return torch.cat([*whole, soft_part, hard_part, *parts[:2], zero, *parts[2:]], -1)


def _soft(spec: RowSpec, rows: _Rows, sums: Iterable[Tensor], zero: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """All terms -> value `[n, 1]` of whole rows, what these columns add to it, gradient `[n, V_r]`."""
    remaining = iter(sums)
    whole, part, gradient = zero, zero, None
    for term in _terms(spec.objective):
        row, divergence = rows.rows[term.temperature], term.divergence
        weight, known = term.weight * term.scale, ()
        if divergence.gradient_without_sums:
            (element,) = divergence.elements(torch, row)
            part = part + weight * _sum(element)
        else:
            count = 1 if divergence.chain_rule else len(divergence.elements(torch, row))
            known = (rows.others.pop(0),) if divergence.chain_rule else tuple(next(remaining) for _ in range(count))
            whole = whole + weight * divergence.value(torch, known)
        if spec.with_gradient:
            factor = spec.objective.soft_weight * weight / term.temperature
            of_term = factor * divergence.gradient(torch, row, known)
            gradient = of_term if gradient is None else gradient + of_term
    return whole, part, gradient


def _hard(spec: RowSpec, rows: _Rows, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (smoothed) and z-loss, likewise; the gradient is short of the label's part."""
    objective = spec.objective
    smoothing, log_q = objective.label_smoothing, rows.log_q()
    maximum, log_sum = rows.student[1.0]
    q = log_q.exp()
    value, part, gradient = log_sum - (spec.student.apply(rows.others[-1]) - maximum), torch.zeros_like(log_sum), q
    if smoothing:
        value, part = (1 - smoothing) * value, -smoothing / vocab_size * _sum(log_q)
        gradient = gradient - smoothing / vocab_size
    if objective.z_loss_weight:
        lse = maximum + log_sum
        value = value + objective.z_loss_weight * lse.square()
        gradient = gradient + (2 * objective.z_loss_weight) * lse * q
    return value, part, objective.hard_weight * gradient
