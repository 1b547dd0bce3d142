"""Divergences of the two probability distributions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kd_plugin.divergences.definition import TINY, Divergence, Ops, Row, Sums, first, separable

if TYPE_CHECKING:
    from torch import Tensor

# |log p - log q| is capped inside mixtures: past e^80 the smaller probability does not change the mixture.
_RATIO_CAP = 80.0


def _log_ratio_to_mixture(op: Ops, d: Tensor, share: float) -> Tensor:
    """log(x / m) for m = share * y + (1 - share) * x, with d = log y - log x.

    Relative to whichever of the two has the larger share: a share that rounds to 1 would give log1p(-1).
    """
    d = op.clamp(d, -_RATIO_CAP, _RATIO_CAP)
    if share <= 0.5:
        return -op.log1p(share * op.expm1(d))
    return -(d + op.log1p((1 - share) * op.expm1(-d)))


@functools.cache
def forward_kl() -> Divergence:
    """KL(p||q): the student must cover all that the teacher does."""
    return Divergence(
        "forward_kl",
        formula="sum p (log p - log q)",
        gradient_formula="q - p",
        source="Hinton et al. 2015, arXiv:1503.02531",
        elements=lambda op, x: (x.p * (x.lp - x.lq) + (x.q - x.p),),
        value=first,
        gradient=lambda op, x, sums: x.q - x.p,
        gradient_without_sums=True,
    )


@functools.cache
def soft_ce() -> Divergence:
    """Cross-entropy against the teacher: forward_kl plus the teacher's entropy, with the same gradient."""
    return Divergence(
        "soft_ce",
        formula="-sum p log q",
        gradient_formula="q - p",
        source="Hinton et al. 2015, arXiv:1503.02531",
        elements=lambda op, x: (-x.p * x.lq,),
        value=first,
        gradient=lambda op, x, sums: x.q - x.p,
        gradient_without_sums=True,
    )


@functools.cache
def reverse_kl() -> Divergence:
    """KL(q||p): the student may drop what the teacher finds unlikely."""
    return Divergence(
        "reverse_kl",
        formula="sum q (log q - log p)",
        gradient_formula="q (log q - log p - value)",
        source="Gu et al. 2023 (MiniLLM), arXiv:2306.08543",
        elements=lambda op, x: (x.q * (x.lq - x.lp) + (x.p - x.q),),
        value=first,
        gradient=lambda op, x, sums: x.q * ((x.lq - x.lp) - sums[0]),
        chain_rule=True,
    )


@functools.cache
def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture."""

    def log_q_over_m(op: Ops, x: Row) -> Tensor:
        return _log_ratio_to_mixture(op, x.lp - x.lq, beta)

    def element(op: Ops, x: Row) -> Tensor:
        r = log_q_over_m(op, x)
        d = op.clamp(x.lp - x.lq, -_RATIO_CAP, _RATIO_CAP)
        return beta * x.p * (d + r) + (1 - beta) * x.q * r

    return separable(
        "jsd",
        element,
        lambda op, x: (1 - beta) * x.q * log_q_over_m(op, x),
        formula="beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q",
        gradient_formula="(1-beta) q (log(q/m) - KL(q||m))",
        source="Agarwal et al. 2023 (GKD), arXiv:2306.13649",
    )


@functools.cache
def skew_kl(alpha: float) -> Divergence:
    """KL(p||m) with a little of the teacher mixed into the student: bounded where the student has no mass."""

    def log_p_over_m(op: Ops, x: Row) -> Tensor:
        return _log_ratio_to_mixture(op, x.lq - x.lp, 1 - alpha)

    def mixture(x: Row) -> Tensor:
        return alpha * x.p + (1 - alpha) * x.q

    return separable(
        "skew_kl",
        lambda op, x: x.p * log_p_over_m(op, x) + (mixture(x) - x.p),
        lambda op, x: (alpha - 1) * x.q * op.exp(log_p_over_m(op, x)),
        formula="KL(p||m), m = alpha p + (1-alpha) q",
        gradient_formula="g - q sum g, g = -(1-alpha) q p/m",
        source="Ko et al. 2024 (DistiLLM), arXiv:2402.03898",
    )


@functools.cache
def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q||m) with a little of the student mixed into the teacher."""

    def log_q_over_m(op: Ops, x: Row) -> Tensor:
        return _log_ratio_to_mixture(op, x.lp - x.lq, 1 - alpha)

    def slope(op: Ops, x: Row) -> Tensor:
        r = log_q_over_m(op, x)
        return x.q * (r + 1 - alpha * op.exp(r))

    return separable(
        "skew_reverse_kl",
        lambda op, x: x.q * log_q_over_m(op, x) + (1 - alpha) * (x.p - x.q),
        slope,
        formula="KL(q||m), m = (1-alpha) p + alpha q",
        gradient_formula="g - q sum g, g = q (log(q/m) + 1 - alpha q/m)",
        source="Ko et al. 2024 (DistiLLM), arXiv:2402.03898",
    )


@functools.cache
def tvd() -> Divergence:
    """Total variation distance: 1 minus the acceptance rate of speculative decoding."""
    return separable(
        "tvd",
        lambda op, x: 0.5 * op.abs(x.p - x.q),
        lambda op, x: 0.5 * x.q * op.sign(x.q - x.p),
        formula="sum |p - q| / 2",
        gradient_formula="q (s - sum q s) / 2, s = sign(q - p)",
        source="Wen et al. 2023, arXiv:2307.15190",
    )


@functools.cache
def acceptance() -> Divergence:
    """Negative logarithm of the probability that speculative decoding accepts the student's token."""

    def slope(op: Ops, x: Row) -> Tensor:  # of min(p, q); where they are equal, half of each side's
        return 0.5 * x.q * (1 - op.sign(x.q - x.p))

    def gradient(op: Ops, x: Row, sums: Sums) -> Tensor:
        return (x.q * sums[1] - slope(op, x)) / op.clamp_min(sums[0], TINY)

    return Divergence(
        "acceptance",
        formula="-log sum min(p, q)",
        gradient_formula="(q sum g - g) / sum min(p, q), g = q [q < p]",
        source="LK loss of SpecForge; Leviathan et al. 2022, arXiv:2211.17192",
        elements=lambda op, x: (op.minimum(x.p, x.q), slope(op, x)),
        value=lambda op, sums: -op.log(op.clamp_min(sums[0], TINY)),
        gradient=gradient,
    )


@functools.cache
def uld() -> Divergence:
    """Distance of the two sorted distributions; token ids carry no meaning, so any two vocabularies compare."""
    return separable(
        "uld",
        lambda op, x: op.abs(x.q - x.p),
        lambda op, x: x.q * op.sign(x.q - x.p),
        formula="sum |sort p - sort q|",
        gradient_formula="q (s - sum q s), s = sign(q - p of the same rank)",
        source="Boizard et al. 2024, arXiv:2402.12030",
        sorts=True,
    )
