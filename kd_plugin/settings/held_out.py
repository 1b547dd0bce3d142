# pyright: strict
"""Settings of what the evaluations on held-out text decide; nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from kd_plugin.settings.distill import Section

__all__ = ["HeldOutMetric", "StopConfig", "is_better"]

HeldOutMetric = Literal["kl_t1", "perplexity", "hard_loss", "soft_loss", "top1_agreement", "acceptance_rate"]


class StopConfig(Section):
    """When a run ends early."""

    metric: HeldOutMetric = "kl_t1"
    """Held-out metric; `top1_agreement` and `acceptance_rate` are better when larger, the others when smaller."""

    patience: PositiveInt = 3
    """Evaluations in a row, without a better one, after which the run ends."""

    min_change: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How much better than the best so far counts as better, in the metric's own unit."""


def is_better(metric: str, new: float, old: float, min_change: float = 0.0) -> bool:
    """Whether `new` is better than `old` by more than `min_change`; what is not a number is not."""
    gain = new - old if metric in ("top1_agreement", "acceptance_rate") else old - new
    return gain > min_change
