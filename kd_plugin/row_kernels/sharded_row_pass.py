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

A student with more token ids than its teacher has a second softmax at temperature 1: over all of them, for the hard
loss and the metrics, beside that over the ids of both. Some ranks then hold columns that the teacher lacks.

Formulas: log-sum-exp merging of partial softmaxes, as in online softmax (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kd_plugin.distributed.vocab_slice import Sizes
from kd_plugin.divergences.definition import LOG_FLOOR, TINY, Row
from kd_plugin.divergences.measures import TOP1_AGREEMENT
from kd_plugin.row_kernels.row_pass import RowSpec, write_gradient
from kd_plugin.row_kernels.sharded_numbers import (
    Kind,
    chained,
    soft_terms,
    student_softmaxes,
    summed,
    teacher_temperatures,
)
from kd_plugin.row_kernels.softmaxes import Whole, parts_of, row_sum
from kd_plugin.row_kernels.statistics import cross_entropy, in_columns, metric_sums


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _first(logits: Tensor, count: int) -> Tensor:
    return parts_of(logits, count)[0]


def _here(student_logits: Tensor, teacher_logits: Tensor | None) -> int:
    """How many of this rank's columns the teacher has too."""
    return student_logits.shape[1] if teacher_logits is None else teacher_logits.shape[1]


def _moment(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exponentials `[n, 1]`; no columns, or nothing but -inf (padding, masked ids), have no mass."""
    lowest = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0], 1), lowest), logits.new_zeros(logits.shape[0], 1)
    shift = logits.amax(-1, keepdim=True).clamp_min(lowest)
    return shift, row_sum((logits - shift).exp())


def slice_moments(
    spec: RowSpec,
    sizes: Sizes,
    student_logits: Tensor,  # [n, V_r]
    teacher_logits: Tensor | None,  # [n, V'_r], V'_r <= V_r
) -> Tensor:
    """The first part: what this rank's columns say of each row, `[n, M]`.

    Maximum and sum of exponentials of each softmax, student's first; whether one column is the maximum of both
    models; the values of the divergences that obey the chain rule, of the softmaxes over these columns alone.
    """
    objective, here = spec.objective, _here(student_logits, teacher_logits)
    students: dict[Kind, Tensor] = {}
    for kind in student_softmaxes(objective, sizes.unequal):
        logits = spec.student.apply(student_logits)
        students[kind] = _tempered(logits if kind.over_all else _first(logits, here), kind.temperature)
    teachers: dict[float, Tensor] = {}
    if teacher_logits is not None:
        teachers = {t: _tempered(spec.teacher.apply(teacher_logits), t) for t in teacher_temperatures(objective)}
    of_student = {kind: _moment(logits) for kind, logits in students.items()}
    of_teacher = {t: _moment(logits) for t, logits in teachers.items()}
    columns = [number for moment in (*of_student.values(), *of_teacher.values()) for number in moment]
    if objective.measured:
        whole = Kind(1.0, sizes.unequal)
        best = (_first(students[whole], here) == of_student[whole][0]) & (teachers[1.0] == of_teacher[1.0][0])
        columns.append(best.any(-1, keepdim=True).to(student_logits.dtype))
    for term in chained(objective):
        t, kind = term.temperature, Kind(term.temperature, False)
        row = _normalised(students[kind], teachers[t], _logs(of_student[kind]), _logs(of_teacher[t]), sizes.shared)
        columns += [row_sum(e) for e in term.divergence.elements(torch, row)]
    return torch.cat(columns, -1)


def _logs(moment: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return moment[0], moment[1].clamp_min(TINY).log()


def _normalised(s: Tensor, t: Tensor, of_s: tuple[Tensor, Tensor], of_t: tuple[Tensor, Tensor], size: int) -> Row:
    """Both models' rows, given what normalises them: maximum and log-sum, `[n, 1]` each."""
    lq, lp = (((x - m) - log_sum).clamp_min(LOG_FLOOR) for x, (m, log_sum) in ((s, of_s), (t, of_t)))
    return Row(s, t, lq, lp, lq.exp(), lp.exp(), size)


def merge_moments(spec: RowSpec, sizes: Sizes, gathered: Tensor) -> Tensor:
    """Merge the moments `[W, n, M]` of all ranks into those of the whole rows, `[n, M]`.

    The sums of exponentials come out as *logarithms*. With a hard loss there is one more column on both sides: the
    label's logit, 0 except from the rank that holds it.
    """
    objective = spec.objective
    of_student, of_teacher = student_softmaxes(objective, sizes.unequal), teacher_temperatures(objective)
    end = 2 * (len(of_student) + len(of_teacher))
    maxima, sums = gathered[..., 0:end:2], gathered[..., 1:end:2]
    maximum = maxima.amax(0)
    log_sum = (sums * (maxima - maximum).exp()).sum(0).log()
    merged = [torch.stack([maximum, log_sum], -1).flatten(-2)]
    others = iter(gathered[..., end:].split(1, -1))

    def both(temperature: float, over_all: bool = False) -> list[int]:
        return [of_student.index(Kind(temperature, over_all)), len(of_student) + of_teacher.index(temperature)]

    if objective.measured:
        chosen = both(1.0, sizes.unequal)
        at_the_top = (maxima[..., chosen] == maximum[:, chosen]).all(-1, keepdim=True)
        merged.append((next(others) * at_the_top).amax(0))
    log_masses = torch.where(sums > 0, ((maxima - maximum) + sums.log()) - log_sum, 0.0)
    masses = torch.where(sums > 0, log_masses.exp(), 0.0)
    for term in chained(objective):
        s, t = both(term.temperature)
        lq, lp, q, p = (x[..., i, None] for x in (log_masses, masses) for i in (s, t))
        between = term.divergence.elements(torch, Row(lq, lp, lq, lp, q, p, gathered.shape[0]))[0]
        merged.append((between + q * next(others)).sum(0))
    return torch.cat([*merged, *(column.sum(0) for column in others)], -1)


class _Rows:
    """The rows of one chunk at each temperature, normalised over all ranks' columns."""

    def __init__(
        self, spec: RowSpec, student_logits: Tensor, teacher_logits: Tensor | None, merged: Tensor, sizes: Sizes
    ) -> None:
        objective, self.sizes = spec.objective, sizes
        of_student, of_teacher = student_softmaxes(objective, sizes.unequal), teacher_temperatures(objective)
        columns = merged.split(1, -1)
        pairs = list(zip(columns[0::2], columns[1::2], strict=False))
        self.student = dict(zip(of_student, pairs, strict=False))
        self.others = list(columns[2 * (len(of_student) + len(of_teacher)) :])
        self.parts = parts_of(student_logits, _here(student_logits, teacher_logits))
        """The raw logits in parts: the columns that the teacher has too, and the rest if there is one."""
        self.logits = [spec.student.apply(part) for part in self.parts]
        self.rows: dict[float, Row] = {}
        """By temperature: both models' distributions over the shared token ids."""
        self.measured: Row | None = None
        """Both models at temperature 1, the student normalised over all of its token ids."""
        if teacher_logits is not None:
            others = spec.teacher.apply(teacher_logits)
            for t, moment in zip(of_teacher, pairs[len(of_student) :], strict=False):
                s_t, t_t = _tempered(self.logits[0], t), _tempered(others, t)
                kinds = [kind for kind in of_student if kind.temperature == t]
                of_kind = {kind: _normalised(s_t, t_t, self.student[kind], moment, sizes.shared) for kind in kinds}
                if (row := of_kind.get(Kind(t, False))) is not None:
                    self.rows[t] = row
                if t == 1.0 and objective.measured:
                    self.measured = of_kind[Kind(1.0, sizes.unequal)]

    def whole_student(self) -> Whole:
        """The student's distribution at temperature 1 over all of its token ids, of which the parts here."""
        maximum, log_sum = self.student[Kind(1.0, self.sizes.unequal)]
        if not self.sizes.unequal and (row := self.rows.get(1.0)) is not None:
            return Whole((row.lq,), (row.q,), maximum, log_sum)
        log_probs = tuple(((part - maximum) - log_sum).clamp_min(LOG_FLOOR) for part in self.logits)
        return Whole(log_probs, tuple(part.exp() for part in log_probs), maximum, log_sum)


def slice_sums(
    spec: RowSpec,
    sizes: Sizes,
    student_logits: Tensor,  # [n, V_r]
    teacher_logits: Tensor | None,  # [n, V'_r]
    merged: Tensor,  # [n, M]
) -> Tensor:
    """`[n, S]`: this rank's part of every sum that a gradient reads."""
    rows = _Rows(spec, student_logits, teacher_logits, merged, sizes).rows
    of_terms = (t.divergence.elements(torch, rows[t.temperature]) for t in summed(spec.objective))
    return torch.cat([row_sum(element) for elements in of_terms for element in elements], -1)


def slice_finish(
    spec: RowSpec,
    sizes: Sizes,
    student_logits: Tensor,  # [n, V_r]; overwritten with the gradient of this rank's columns
    teacher_logits: Tensor | None,  # [n, V'_r]
    row_weights: Tensor | None,  # [n, 1]
    merged: Tensor,  # [n, M]
    sums: Tensor,  # [n, S], added over ranks
    hard_weights: Tensor | None = None,  # [n, 1]
) -> Tensor:
    """The last part: writes the gradient, as `row_pass` does, and returns two times the statistics, side by side.

    `[n, 2 * len(STATISTICS)]`: first what every rank knows of the whole row, then what this rank's columns add to it.
    """
    objective = spec.objective
    rows = _Rows(spec, student_logits, teacher_logits, merged, sizes)
    zero = merged.new_zeros(merged.shape[0], 1)
    known: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    hard_gradients: list[Tensor] = []
    if objective.measured:
        known[TOP1_AGREEMENT] = rows.others.pop(0)
    totals = sums.split(1, -1) if sums.shape[-1] else ()
    known["soft_loss"], added["soft_loss"], soft_gradient = _slice_soft(spec, rows, totals, zero)
    if objective.hard_weight or objective.measured:
        student = rows.whole_student()
        if rows.measured is not None:
            added |= metric_sums(rows.measured, student, sorts=False)
        if objective.hard_weight:
            labels = spec.student.apply(rows.others[-1])
            value, smoothed, hard_gradients = cross_entropy(objective, student, sizes.student, labels)
            known["hard_loss"] = value
            if smoothed is not None:
                added["hard_loss"] = smoothed
    if spec.with_gradient:
        write_gradient(spec, rows.parts, soft_gradient, hard_gradients, row_weights, hard_weights)
    return torch.cat([in_columns(known, zero), in_columns(added, zero)], -1)


def _slice_soft(
    spec: RowSpec, rows: _Rows, sums: Iterable[Tensor], zero: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The soft loss: its value where a whole row's is known `[n, 1]`, what these columns add, gradient `[n, V'_r]`."""
    remaining = iter(sums)
    whole, part, gradient = zero, zero, None
    for term in soft_terms(spec.objective):
        row, divergence = rows.rows[term.temperature], term.divergence
        weight, known = term.weight * term.scale, ()
        if divergence.gradient_without_sums:
            (element,) = divergence.elements(torch, row)
            part = part + weight * row_sum(element)
        else:
            count = 1 if divergence.chain_rule else len(divergence.elements(torch, row))
            known = (rows.others.pop(0),) if divergence.chain_rule else tuple(next(remaining) for _ in range(count))
            whole = whole + weight * divergence.value(torch, known)
        if spec.with_gradient:
            factor = spec.objective.soft_weight * weight / term.temperature
            of_term = factor * divergence.gradient(torch, row, known)
            gradient = of_term if gradient is None else gradient + of_term
    return whole, part, gradient
