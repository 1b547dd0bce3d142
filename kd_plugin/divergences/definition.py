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

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, overload

if TYPE_CHECKING:
    from torch import Tensor

# Log-probabilities are floored here: exp of it is 0 in fp64 too, and 0 * LOG_FLOOR is 0, not NaN, so that
# -inf logits mean probability zero. Legal log-probabilities of logits up to +-1e4 lie far above it.
LOG_FLOOR = -1e5
# Smallest sum that is divided by or whose logarithm is taken.
TINY = 1e-30


class Row(NamedTuple):
    """What a definition may read; every field is `[C, V]`."""

    s: Tensor
    t: Tensor
    lq: Tensor
    lp: Tensor
    q: Tensor
    p: Tensor
    vocab_size: int
    """Number of columns that the sums run over (all ranks together)."""


Sums: TypeAlias = "tuple[Tensor, ...]"


class _Functions(Protocol):
    def abs(self, x: Tensor, /) -> Tensor: ...
    def clamp(self, x: Tensor, least: float, most: float, /) -> Tensor: ...
    def clamp_min(self, x: Tensor, least: float, /) -> Tensor: ...
    def exp(self, x: Tensor, /) -> Tensor: ...
    def expm1(self, x: Tensor, /) -> Tensor: ...
    def log(self, x: Tensor, /) -> Tensor: ...
    def log1p(self, x: Tensor, /) -> Tensor: ...
    def minimum(self, x: Tensor, y: Tensor, /) -> Tensor: ...
    def sign(self, x: Tensor, /) -> Tensor: ...
    def sqrt(self, x: Tensor, /) -> Tensor: ...
    @overload
    def where(self, condition: Tensor, x: Tensor, y: float, /) -> Tensor: ...
    @overload
    def where(self, condition: Tensor, x: float, y: float, /) -> Tensor: ...


class Ops(_Functions, Protocol):
    """The functions that definitions call, elementwise; torch has them."""


@dataclass(frozen=True)
class Divergence:
    """One divergence, closed form, per row."""

    name: str
    formula: str
    """The value as in the literature."""
    gradient_formula: str
    """Gradient with respect to `z_s / temperature`."""
    source: str
    elements: Callable[[Ops, Row], Sums]
    """`(op, row)` -> tensors `[C, V]` whose sums over the vocabulary the other two receive."""
    value: Callable[[Ops, Sums], Tensor]
    """`(op, sums)` -> the row's value `[C]`."""
    gradient: Callable[[Ops, Row, Sums], Tensor]
    """`(op, row, sums)` -> gradient `[C, V]` with respect to `z_s / temperature`."""
    sorts: bool = False
    """Whether both distributions are sorted and paired by place, instead of by token id."""
    gradient_without_sums: bool = False
    """The gradient reads no sum and the value is the first: parts of a row must know only of each other's softmax."""
    chain_rule: bool = False
    """The value of a row cut in parts is that of the parts' masses plus each part's own, weighted by its mass of q."""


def first(op: Ops, sums: Sums) -> Tensor:
    """The value is the first sum."""
    return sums[0]


def through_softmax(op: Ops, row: Row, sums: Sums, slope: Tensor) -> Tensor:
    """Gradient from the elements of `slope`, whose sum is the second one."""
    return slope - row.q * sums[1]


def separable(
    name: str,
    element: Callable[[Ops, Row], Tensor],
    slope: Callable[[Ops, Row], Tensor],
    *,
    formula: str,
    gradient_formula: str,
    source: str,
    sorts: bool = False,
) -> Divergence:
    """A divergence `sum_v element(q, p)` whose `slope` is d element / d log q."""
    return Divergence(
        name,
        elements=lambda op, row: (element(op, row), slope(op, row)),
        value=first,
        gradient=lambda op, row, sums: through_softmax(op, row, sums, slope(op, row)),
        formula=formula,
        gradient_formula=gradient_formula,
        source=source,
        sorts=sorts,
    )
