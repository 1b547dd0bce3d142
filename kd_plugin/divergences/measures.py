"""What is measured of a row beside its losses: each metric's name and formula, once.

A metric is a sum over token ids of the two distributions at temperature 1, whatever the temperature of the loss;
entropies and KL are in nats. The dense and the vocabulary-parallel row pass, the names of `DistillOutput.metrics` and
TensorBoard's tags follow from this list. The student's distribution is over all of its token ids; a teacher that
lacks some of them gives those probability 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences.definition import Row


class Measure(NamedTuple):
    """One metric of a row."""

    name: str
    shared: Callable[[Row], Tensor] | None
    """`[n, V']`, what each token id that both models have adds to it, with `row.lq` and `row.q` normalised over all of
    the student's ids. None for the agreement, which is no sum: whether one token id is the most likely of both."""
    beyond: Callable[[Tensor, Tensor], Tensor] | None = None
    """`(log q, q) -> [n, V - V']`, what each id adds that the student alone has; None: nothing."""
    if_sorted: bool = False
    """Whether it means something where the divergence sorts, so that token ids do not correspond."""


TOP1_AGREEMENT = "top1_agreement"
"""The metric that is no sum over token ids; each row pass finds it in its own way."""
MEASURES = (
    Measure("teacher_entropy", lambda row: -row.p * row.lp, if_sorted=True),
    Measure("student_entropy", lambda row: -row.q * row.lq, lambda lq, q: -q * lq, if_sorted=True),
    Measure(TOP1_AGREEMENT, None),
    # The chance that speculative decoding accepts a draft of the student (arXiv:2211.17192)
    Measure("acceptance_rate", lambda row: torch.minimum(row.q, row.p)),
    # KL(teacher || student); q - p sums to 0 and makes every term positive
    Measure("kl_t1", lambda row: row.p * (row.lp - row.lq) + (row.q - row.p), lambda lq, q: q),
)
MEASURED = tuple(measure.name for measure in MEASURES)
