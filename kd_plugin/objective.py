"""The configured objective, reduced to what a row kernel needs."""

from __future__ import annotations

import math
from typing import NamedTuple

from kd_plugin.config import DistillConfig
from kd_plugin.divergences import Divergence, get


class Term(NamedTuple):
    """One part of the soft loss: `weight * temperature**power * divergence`."""

    divergence: Divergence
    weight: float
    temperature: float
    scale: float
    """temperature ** temperature_power."""


class Objective(NamedTuple):
    """What a row kernel computes; hashable, so that each objective is compiled once."""

    terms: tuple[Term, ...]
    soft_weight: float
    hard_weight: float
    metrics: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether any teacher logits are read at all."""
        return bool(self.terms) and self.soft_weight != 0


def make_objective(config: DistillConfig) -> Objective:
    """The objective of a `DistillConfig`."""
    temperature = config.temperature
    divergence = get(config.divergence, beta=config.beta)
    term = Term(divergence, 1.0, temperature, math.pow(temperature, config.temperature_power))
    return Objective((term,), config.soft_weight, config.hard_weight, config.metrics)
