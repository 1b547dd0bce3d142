"""Distances of the logits themselves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kd_plugin.divergences.definition import LOG_FLOOR, TINY, Divergence, Ops, Row, Sums, first

if TYPE_CHECKING:
    from torch import Tensor


def _where_both(op: Ops, x: Row, value: Tensor | float) -> Tensor:
    """`value` where neither model masks the token with -inf, else 0."""
    return op.where(op.minimum(x.s, x.t) > LOG_FLOOR, value, 0.0)


@functools.cache
def logit_mse() -> Divergence:
    """Half the squared distance of the logits; not invariant to a shift of either side."""

    def difference(op: Ops, x: Row) -> Tensor:
        return _where_both(op, x, x.s - x.t)

    return Divergence(
        "logit_mse",
        formula="sum (z_s - z_t)^2 / 2",
        gradient_formula="z_s - z_t",
        source="Ba and Caruana 2013, arXiv:1312.6184",
        elements=lambda op, x: (0.5 * difference(op, x) * difference(op, x),),
        value=first,
        gradient=lambda op, x, sums: difference(op, x),
        gradient_without_sums=True,
    )


@functools.cache
def logit_mse_centered() -> Divergence:
    """Half the squared distance of the logits after subtracting each side's mean: V times Hinton's limit."""

    def difference(op: Ops, x: Row) -> Tensor:  # of log-probabilities: the same up to a constant near the mean
        return _where_both(op, x, x.lq - x.lp)

    def elements(op: Ops, x: Row) -> Sums:
        d = difference(op, x)
        return d * d, d, _where_both(op, x, 1.0)

    return Divergence(
        "logit_mse_centered",
        formula="sum (d - mean d)^2 / 2, d = z_s - z_t",
        gradient_formula="d - mean d",
        source="Hinton et al. 2015, arXiv:1503.02531, section 2.1",
        elements=elements,
        value=lambda op, sums: 0.5 * (sums[0] - sums[1] * sums[1] / sums[2]),
        gradient=lambda op, x, sums: _where_both(op, x, difference(op, x) - sums[1] / sums[2]),
    )


@functools.cache
def cosine() -> Divergence:
    """One minus the cosine of the angle between the logits."""

    def norms(op: Ops, sums: Sums) -> Tensor:
        return op.sqrt(op.clamp_min(sums[1] * sums[2], TINY))

    def gradient(op: Ops, x: Row, sums: Sums) -> Tensor:
        along = x.s * (sums[0] / op.clamp_min(sums[1], TINY))
        return _where_both(op, x, (along - x.t) / norms(op, sums))

    return Divergence(
        "cosine",
        formula="1 - cos(z_s, z_t)",
        gradient_formula="(cos z_s / |z_s| - z_t / |z_t|) / |z_s|",
        source="Liger-Kernel's cosine similarity distillation, here on valid rows only",
        elements=lambda op, x: tuple(_where_both(op, x, v) for v in (x.s * x.t, x.s * x.s, x.t * x.t)),
        value=lambda op, sums: 1 - sums[0] / norms(op, sums),
        gradient=gradient,
    )
