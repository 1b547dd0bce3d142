"""The row pass cut where ranks must talk: each rank holds some columns (token ids) of every row.

    moments (local maximum and sum of exponentials)   -> exchanged and merged: the softmax of the whole row
    sums (local sums of the definitions' elements)    -> added over ranks: the row's losses
    gradient (local columns, from moments and sums)

Three pure functions on `[n, V/W]`, so that each compiles to one graph; what travels between them is a few
numbers per row. Formulas: log-sum-exp merging of partial softmaxes, as in online softmax (arXiv:1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugin.divergences import LOG_FLOOR, Row
from kd_plugin.objective import Objective
from kd_plugin.row_kernels.body import RowSpec

_NUM_METRIC_SUMS = 5


def student_temperatures(objective: Objective) -> tuple[float, ...]:
    """Temperatures at which the student's softmax is needed, ascending."""
    found = {term.temperature for term in objective.terms} if objective.needs_teacher else set()
    if objective.hard_weight or objective.measured:
        found.add(1.0)
    return tuple(sorted(found))


def teacher_temperatures(objective: Objective) -> tuple[float, ...]:
    """Likewise, the teacher's."""
    if not objective.needs_teacher:
        return ()
    return tuple(sorted({term.temperature for term in objective.terms} | ({1.0} if objective.measured else set())))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def shard_moments(spec: RowSpec, vocab_size: int, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """`[n, 2 * softmaxes]`: maximum and sum of exponentials of this rank's columns, student's first."""
    columns = []
    sides = [(spec.student.apply(student_logits), student_temperatures(spec.objective))]
    if teacher_logits is not None:
        sides.append((spec.teacher.apply(teacher_logits), teacher_temperatures(spec.objective)))
    for logits, temperatures in sides:
        for temperature in temperatures:
            tempered = _tempered(logits, temperature)
            maximum = tempered.amax(-1, keepdim=True)
            # a shard of nothing but -inf (padding, masked ids) has no mass, not NaN
            shift = maximum.clamp_min(torch.finfo(logits.dtype).min)
            columns += [shift, (tempered - shift).exp().sum(-1, keepdim=True)]
    return torch.cat(columns, -1)


def no_moments(spec: RowSpec, student_logits: Tensor) -> Tensor:
    """Of a rank without columns: `[n, 2k]` that change nothing when merged."""
    count = len(student_temperatures(spec.objective)) + len(teacher_temperatures(spec.objective))
    lowest = student_logits.new_full((student_logits.shape[0], count), torch.finfo(student_logits.dtype).min)
    return torch.stack([lowest, torch.zeros_like(lowest)], -1).flatten(-2)


def merge_moments(gathered: Tensor) -> Tensor:
    """`[W, n, 2k]` of all ranks -> `[n, 2k]`: maximum and *logarithm* of the sum, of the whole row."""
    maxima, sums = gathered[..., 0::2], gathered[..., 1::2]
    maximum = maxima.amax(0)
    log_sum = (sums * (maxima - maximum).exp()).sum(0).log()
    return torch.stack([maximum, log_sum], -1).flatten(-2)


class _Rows:
    """The rows of one chunk at each temperature, normalised over all ranks' columns."""

    def __init__(
        self, spec: RowSpec, student_logits: Tensor, teacher_logits: Tensor | None, moments: Tensor, size: int
    ):
        objective = spec.objective
        self.logits = spec.student.apply(student_logits)
        self.of_student, self.moments = student_temperatures(objective), moments
        of_teacher = teacher_temperatures(objective)
        self.log_q = {t: self._log_probs(self.logits, t, i) for i, t in enumerate(self.of_student)}
        self.rows: dict[float, Row] = {}
        if teacher_logits is not None:
            others = spec.teacher.apply(teacher_logits)
            for i, t in enumerate(of_teacher):
                lq, lp = self.log_q[t], self._log_probs(others, t, len(self.of_student) + i)
                self.rows[t] = Row(_tempered(self.logits, t), _tempered(others, t), lq, lp, lq.exp(), lp.exp(), size)

    def moment(self, index: int) -> tuple[Tensor, Tensor]:
        """Maximum and log-sum `[n, 1]` of softmax number `index`."""
        return self.moments[:, 2 * index, None], self.moments[:, 2 * index + 1, None]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Those of the student at temperature 1."""
        return self.moment(self.of_student.index(1.0))

    def _log_probs(self, logits: Tensor, temperature: float, index: int) -> Tensor:
        maximum, log_sum = self.moment(index)
        return ((_tempered(logits, temperature) - maximum) - log_sum).clamp_min(LOG_FLOOR)


def _metric_elements(rows: _Rows) -> list[Tensor]:
    row = rows.rows[1.0]
    teacher = len(rows.of_student) + tuple(rows.rows).index(1.0)
    # the most likely token's log-probability is exactly -log_sum: its logit is the maximum
    best = (row.lq == -rows.plain()[1]) & (row.lp == -rows.moment(teacher)[1])
    return [
        -row.p * row.lp,
        -row.q * row.lq,
        best.to(row.q.dtype),
        torch.minimum(row.q, row.p),
        row.p * (row.lp - row.lq) + (row.q - row.p),
    ]


def _elements(spec: RowSpec, rows: _Rows) -> list[list[Tensor]]:
    """Everything that is summed over the vocabulary, in groups: each term's, the smoothing's, the metrics'."""
    objective = spec.objective
    groups = [list(t.divergence.elements(torch, rows.rows[t.temperature])) for t in objective.terms if rows.rows]
    groups.append([rows.log_q[1.0]] if objective.hard_weight and objective.label_smoothing else [])
    groups.append(_metric_elements(rows) if objective.measured else [])
    return groups


def shard_sums(
    spec: RowSpec,
    vocab_size: int,
    student_logits: Tensor,  # [n, V_r]
    teacher_logits: Tensor | None,  # [n, V_r]
    moments: Tensor,  # [n, 2k], merged
) -> Tensor:
    """`[n, S]`: this rank's part of every sum that the rows' values and gradients need."""
    rows = _Rows(spec, student_logits, teacher_logits, moments, vocab_size)
    flat = [e.sum(-1, keepdim=True) for group in _elements(spec, rows) for e in group]
    return torch.cat(flat, -1) if flat else moments.new_zeros(moments.shape[0], 0)


def shard_finish(
    spec: RowSpec,
    vocab_size: int,
    student_logits: Tensor,  # [n, V_r]; overwritten with the gradient of this rank's columns
    teacher_logits: Tensor | None,
    target_logits: Tensor | None,  # [n, 1] raw, the same on all ranks
    row_weights: Tensor | None,  # [n, 1]
    moments: Tensor,
    sums: Tensor,  # [n, S], added over ranks
) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` as `row_pass` gives them, and its gradient, from the exchanged numbers."""
    objective = spec.objective
    rows = _Rows(spec, student_logits, teacher_logits, moments, vocab_size)
    *of_terms, smoothing, metrics = _split(sums, [len(group) for group in _elements(spec, rows)])
    zero = moments.new_zeros(moments.shape[0], 1)
    soft, hard, gradient = zero, zero, torch.zeros_like(rows.logits)
    for term, parts in zip(objective.terms, of_terms, strict=False):
        row = rows.rows[term.temperature]
        soft = soft + term.weight * term.scale * term.divergence.value(torch, parts)
        factor = objective.soft_weight * term.weight * term.scale / term.temperature
        gradient = gradient + factor * term.divergence.gradient(torch, row, parts)
    if objective.hard_weight:
        assert target_logits is not None
        maximum, log_sum = rows.plain()
        hard = log_sum - (spec.student.apply(target_logits) - maximum)
        q = rows.log_q[1.0].exp()
        part = q
        if objective.label_smoothing:
            hard = (1 - objective.label_smoothing) * hard - objective.label_smoothing * smoothing[0] / vocab_size
            part = part - objective.label_smoothing / vocab_size
        if objective.z_loss_weight:
            hard = hard + objective.z_loss_weight * (maximum + log_sum).square()
            part = part + (2 * objective.z_loss_weight) * (maximum + log_sum) * q
        gradient = gradient + objective.hard_weight * part
    if spec.with_gradient:
        gradient = gradient * spec.student.jacobian(student_logits)
        student_logits.copy_(gradient if row_weights is None else gradient * row_weights)
    return torch.cat([soft, hard, *(metrics or [zero] * _NUM_METRIC_SUMS)], dim=-1)


def _split(sums: Tensor, lengths: list[int]) -> list[tuple[Tensor, ...]]:
    columns = iter(sums.split(1, dim=-1)) if sums.shape[-1] else iter(())
    return [tuple(next(columns) for _ in range(length)) for length in lengths]
