"""The divergences: one closed-form definition each, from which everything else follows.

A definition is elementwise over the vocabulary. It names what is summed over a row, how the sums become the
row's value, and the gradient of that value with respect to the student's `logits / temperature`. The compiled
row kernel, the Triton row kernel, the vocabulary-parallel loss and the tables in the documentation all read
these definitions; `kd_plugin.reference` deliberately does not, because it is what they are tested against.

Notable decisions:
- definitions see `d = log p - log q` and never take the logarithm of a mixture: `log(q/m)` is computed from
  `d` alone, which is exact where the two models agree and finite where they do not;
- sums carry the terms that cancel over a normalised row (`q - p`), so every element is >= 0 and the sum of a
  vocabulary of 150k is not driven below zero by the rounding of the normaliser;
- with `slope = d element / d log q`, the gradient through the softmax is `slope - q * sum(slope)`;
- functions come in through `op` (torch, or a code generator), so that one definition serves every backend.

Symbols: q student and p teacher probabilities, lq and lp their logarithms (floored at `LOG_FLOOR`), s and t
the logits divided by the temperature; all `[C, V]`, fp32 or fp64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# Log-probabilities are floored here: exp of it is 0 in fp64 too, and 0 * LOG_FLOOR is 0, not NaN, so that
# -inf logits mean probability zero. Legal log-probabilities of logits up to +-1e4 lie far above it.
LOG_FLOOR = -1e5
# |log p - log q| is capped inside mixtures: past e^80 the smaller probability does not change the mixture.
_RATIO_CAP = 80.0


class Row(NamedTuple):
    """What a definition may read; every field is `[C, V]`."""

    s: Any
    t: Any
    lq: Any
    lp: Any
    q: Any
    p: Any
    vocab_size: Any
    """Number of columns that the sums run over (all shards together)."""


Sums = tuple[Any, ...]


@dataclass(frozen=True)
class Divergence:
    """One divergence, closed form, per row."""

    name: str
    formula: str
    """The value as in the literature."""
    gradient_formula: str
    """Gradient with respect to `z_s / temperature`."""
    source: str
    elements: Callable[[Any, Row], Sums]
    """`(op, row)` -> tensors `[C, V]` whose sums over the vocabulary the other two receive."""
    value: Callable[[Any, Sums], Any]
    """`(op, sums)` -> the row's value `[C]`."""
    gradient: Callable[[Any, Row, Sums], Any]
    """`(op, row, sums)` -> gradient `[C, V]` with respect to `z_s / temperature`."""
    needs_probabilities: bool = True
    """False when the definition reads only the logits `s` and `t`."""
    match_by_rank: bool = False
    """True when `p` is to be paired with `q` by rank instead of by token id."""


def _first(op: Any, sums: Sums) -> Any:
    return sums[0]


def _through_softmax(op: Any, row: Row, sums: Sums, slope: Any) -> Any:
    return slope - row.q * sums[1]


def _log_ratio_to_mixture(op: Any, d: Any, share: float) -> Any:
    """log(x / m) for m = share * y + (1 - share) * x, with d = log y - log x."""
    return -op.log1p(share * op.expm1(op.clamp(d, -_RATIO_CAP, _RATIO_CAP)))


def separable(
    name: str, element: Callable[[Any, Row], Any], slope: Callable[[Any, Row], Any], **about: str
) -> Divergence:
    """A divergence `sum_v element(q, p)` whose `slope` is d element / d log q."""
    return Divergence(
        name,
        elements=lambda op, row: (element(op, row), slope(op, row)),
        value=_first,
        gradient=lambda op, row, sums: _through_softmax(op, row, sums, slope(op, row)),
        **{"formula": "", "gradient_formula": "g - q sum g", "source": "", **about},
    )


@functools.cache
def forward_kl() -> Divergence:
    """KL(p||q): the student must cover all that the teacher does."""
    return Divergence(
        "forward_kl",
        formula="sum p (log p - log q)",
        gradient_formula="q - p",
        source="Hinton et al. 2015, arXiv:1503.02531",
        elements=lambda op, x: (x.p * (x.lp - x.lq) + (x.q - x.p),),
        value=_first,
        gradient=lambda op, x, sums: x.q - x.p,
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
        value=_first,
        gradient=lambda op, x, sums: x.q - x.p,
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
        value=_first,
        gradient=lambda op, x, sums: x.q * ((x.lq - x.lp) - sums[0]),
    )


@functools.cache
def jsd(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture."""

    def log_q_over_m(op: Any, x: Row) -> Any:
        return _log_ratio_to_mixture(op, x.lp - x.lq, beta)

    def elements(op: Any, x: Row) -> Sums:
        r = log_q_over_m(op, x)
        from_student = (1 - beta) * x.q * r
        d = op.clamp(x.lp - x.lq, -_RATIO_CAP, _RATIO_CAP)
        return beta * x.p * (d + r) + from_student, from_student

    return Divergence(
        "jsd",
        formula="beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q",
        gradient_formula="(1-beta) q (log(q/m) - KL(q||m))",
        source="Agarwal et al. 2023 (GKD), arXiv:2306.13649",
        elements=elements,
        value=_first,
        gradient=lambda op, x, sums: _through_softmax(op, x, sums, (1 - beta) * x.q * log_q_over_m(op, x)),
    )


DIVERGENCES: dict[str, Callable[[float, float], Divergence]] = {
    "forward_kl": lambda beta, alpha: forward_kl(),
    "soft_ce": lambda beta, alpha: soft_ce(),
    "reverse_kl": lambda beta, alpha: reverse_kl(),
    "jsd": lambda beta, alpha: jsd(beta),
}
"""Name -> definition for the given `beta` (jsd) and `alpha` (skewed divergences)."""


def get(name: str, *, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The definition called `name`. Raises `ValueError` when there is none."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta, alpha)


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


def make_objective(config: Any) -> Objective:
    """The objective of a `DistillConfig`."""
    temperature = config.temperature
    divergence = get(config.divergence, beta=config.beta)
    term = Term(divergence, 1.0, temperature, math.pow(temperature, config.temperature_power))
    return Objective((term,), config.soft_weight, config.hard_weight, config.metrics)
