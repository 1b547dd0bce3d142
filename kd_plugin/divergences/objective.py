"""The configured objective, reduced to what a row kernel needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kd_plugin.divergences.definition import Divergence
from kd_plugin.divergences.measures import MEASURES
from kd_plugin.divergences.registry import get
from kd_plugin.settings.run import DistillConfig, TermConfig


class Term(NamedTuple):
    """One part of the soft loss: `weight * scale * divergence`."""

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
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    metrics: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether any teacher logits are read at all."""
        return len(self.terms) > 0 and self.soft_weight != 0

    @property
    def sorts(self) -> bool:
        """Whether a divergence sorts both distributions: then ids need not agree, nor vocabularies have one size."""
        return any(term.divergence.sorts for term in self.terms)

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the metrics that mean something for this objective."""
        if not (self.metrics and self.needs_teacher):
            return ()
        return tuple(measure.name for measure in MEASURES if measure.if_sorted or not self.sorts)

    def weighted(self, soft: Tensor, hard: Tensor) -> Tensor:
        """The loss of its two parts."""
        return self.soft_weight * soft + self.hard_weight * hard


def make_objective(config: DistillConfig) -> Objective:
    """The objective of a `DistillConfig`."""
    terms = config.terms if config.terms is not None else (TermConfig(name=config.divergence),)
    return Objective(
        tuple(_term(term, config) for term in terms if term.weight),
        config.soft_weight,
        config.hard_weight,
        config.label_smoothing,
        config.z_loss_weight,
        config.metrics,
    )


def _term(term: TermConfig, config: DistillConfig) -> Term:
    temperature = config.temperature if term.temperature is None else term.temperature
    divergence = get(
        term.name,
        beta=config.beta if term.beta is None else term.beta,
        alpha=config.alpha if term.alpha is None else term.alpha,
    )
    return Term(divergence, term.weight, temperature, temperature**config.temperature_power)
