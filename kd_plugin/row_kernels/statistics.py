"""What a row pass returns of each row, by name: both losses and the metrics.

The dense and the vocabulary-parallel row pass share these formulas. To the former the columns here are all columns; to
the latter they are one rank's, normalised over all ranks', and sums over columns are partial.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kd_plugin.divergences.definition import Row
from kd_plugin.divergences.measures import MEASURED, MEASURES
from kd_plugin.divergences.objective import Objective
from kd_plugin.row_kernels.softmaxes import Whole, row_sum

LOSSES = ("soft_loss", "hard_loss")
STATISTICS = (*LOSSES, *MEASURED)
"""Columns of the statistics that a row kernel returns."""


def in_columns(values: Mapping[str, Tensor], zero: Tensor) -> Tensor:
    """Statistics `[n, len(STATISTICS)]` from values `[n, 1]` by name; `zero` `[n, 1]` for each that is not given."""
    return torch.cat([values.get(name, zero) for name in STATISTICS], dim=-1)


def cross_entropy(
    objective: Objective,
    student: Whole,
    vocab_size: int,  # V, also where only some columns are here
    target_logits: Tensor,  # [n, 1], the student's logit of each row's label
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The hard loss: cross-entropy, smoothed, with z-loss.

    Returns:
        Its value `[n, 1]` but for the mean that smoothing takes over token ids; that part of these columns `[n, 1]`,
        None without smoothing; and the gradient of each part of the columns, weighted, short of the label's own.
    """
    smoothing, smoothed = objective.label_smoothing, None
    value = student.log_sum - (target_logits - student.maximum)
    gradients = list(student.probs)
    if smoothing:
        value = (1 - smoothing) * value
        smoothed = -smoothing * (row_sum(*student.log_probs) / vocab_size)
        gradients = [gradient - smoothing / vocab_size for gradient in gradients]
    if objective.z_loss_weight:
        log_sum_exp = student.maximum + student.log_sum
        value = value + objective.z_loss_weight * log_sum_exp.square()
        slope = (2 * objective.z_loss_weight) * log_sum_exp
        gradients = [gradient + slope * q for gradient, q in zip(gradients, student.probs, strict=True)]
    return value, smoothed, [objective.hard_weight * gradient for gradient in gradients]


def metric_sums(row: Row, student: Whole, *, sorts: bool) -> dict[str, Tensor]:
    """What these columns add to each metric that is a sum, `[n, 1]` by name.

    Args:
        row: both models at temperature 1; of the student's side only its place is taken by `student`.
        student: over all of its token ids.
        sorts: token ids do not correspond, so that metrics that compare them are left out.
    """
    (lq, *_), (q, *_) = student.log_probs, student.probs
    row, rest = row._replace(lq=lq, q=q), list(zip(student.log_probs[1:], student.probs[1:], strict=True))
    sums: dict[str, Tensor] = {}
    for measure in MEASURES:
        if measure.shared is not None and (measure.if_sorted or not sorts):
            beyond = () if measure.beyond is None else (measure.beyond(*part) for part in rest)
            sums[measure.name] = row_sum(measure.shared(row), *beyond)
    return sums
