"""Every divergence by its name."""

from __future__ import annotations

from collections.abc import Callable

from kd_plugin.divergences import logits, probabilities
from kd_plugin.divergences.definition import LOG_FLOOR, Divergence, Row, Sums

__all__ = ["DIVERGENCES", "LOG_FLOOR", "Divergence", "Row", "Sums", "get"]

DIVERGENCES: dict[str, Callable[[float, float], Divergence]] = {
    "forward_kl": lambda beta, alpha: probabilities.forward_kl(),
    "soft_ce": lambda beta, alpha: probabilities.soft_ce(),
    "reverse_kl": lambda beta, alpha: probabilities.reverse_kl(),
    "jsd": lambda beta, alpha: probabilities.jsd(beta),
    "skew_kl": lambda beta, alpha: probabilities.skew_kl(alpha),
    "skew_reverse_kl": lambda beta, alpha: probabilities.skew_reverse_kl(alpha),
    "tvd": lambda beta, alpha: probabilities.tvd(),
    "acceptance": lambda beta, alpha: probabilities.acceptance(),
    "logit_mse": lambda beta, alpha: logits.logit_mse(),
    "logit_mse_centered": lambda beta, alpha: logits.logit_mse_centered(),
    "cosine": lambda beta, alpha: logits.cosine(),
    "uld": lambda beta, alpha: probabilities.uld(),
}
"""Name -> definition for the given `beta` (jsd) and `alpha` (skewed divergences)."""


def get(name: str, *, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The definition called `name`. Raises `ValueError` when there is none."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta, alpha)
