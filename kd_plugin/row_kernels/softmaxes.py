"""Softmaxes of rows of logits: at several temperatures, and over columns in two parts.

The second part are columns that the student has beyond its teacher's. The soft loss takes the first part alone, as a
distribution of its own; the hard loss and the student's side of the metrics take all columns. Their softmax follows
from the parts': one more normaliser per row, and no column's exponential twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences.definition import LOG_FLOOR

# Stands for the -inf of masked columns beyond the teacher's: no NaN where all of them are masked, and nothing in a sum.
_LOWEST = -1e30


def row_sum(*parts: Tensor) -> Tensor:
    """The sum over the columns of all parts `[n, columns]`, `[n, 1]`.

    On a CPU it is taken in fp64: compiled, it goes through thousands of columns one after another, and a divergence
    whose gradient is a small difference of such sums (jsd, tvd) would be off by 1e-4 of itself.
    """
    wide = torch.float64 if parts[0].is_cpu else None
    total, *others = (part.sum(-1, keepdim=True, dtype=wide) for part in parts)
    for other in others:
        total = total + other
    return total.to(parts[0].dtype)


class Softmax(NamedTuple):
    """Log-probabilities `[n, V]`, floored, and what normalised them, `[n, 1]` each.

    The maximum is subtracted before the normaliser: the two subtractions round less than one of their sum.
    """

    log_probs: Tensor
    maximum: Tensor
    log_sum: Tensor


def softmax(logits: Tensor) -> Softmax:
    """The softmax of logits `[n, V]` over the vocabulary."""
    maximum = logits.amax(-1, keepdim=True)
    shifted = logits - maximum
    log_sum = row_sum(shifted.exp()).log()
    return Softmax((shifted - log_sum).clamp_min(LOG_FLOOR), maximum, log_sum)


class Softmaxes:
    """The softmaxes of one model's logits `[n, V]`, each temperature's computed once.

    torch.compile does not merge repetitions.
    """

    def __init__(self, logits: Tensor, temperatures: set[float]) -> None:
        self._logits = logits
        self._known: dict[float, tuple[Tensor, Softmax, Tensor]] = {}
        # exp(x) = exp(x / 2) ** 2, and dividing by a power of two is exact. On a CPU exponentials take most of the
        # time; elsewhere memory does.
        usable = sorted(temperatures & {2.0, 4.0}) if logits.is_cpu else []
        self._root = usable[0] if usable else None

    def at(self, temperature: float) -> tuple[Tensor, Softmax, Tensor]:
        """Logits divided by the temperature, their softmax, and the probabilities `[n, V]`."""
        if temperature not in self._known:
            shared = temperature == 1.0 and self._root is not None
            self._known[temperature] = self._power() if shared else self._plain(temperature)
        return self._known[temperature]

    def _plain(self, temperature: float) -> tuple[Tensor, Softmax, Tensor]:
        scaled = self._logits / temperature if temperature != 1.0 else self._logits
        known = softmax(scaled)
        if temperature == self._root:  # by the exponentials that `_power` reads, too
            return scaled, known, (scaled - known.maximum).exp() / known.log_sum.exp()
        return scaled, known, known.log_probs.exp()

    def _power(self) -> tuple[Tensor, Softmax, Tensor]:
        """Temperature 1 from the exponentials of another."""
        assert self._root is not None
        scaled, (_, maximum, _), _ = self.at(self._root)
        shifted = scaled - maximum
        power = shifted.exp().square()
        if self._root == 4.0:
            power = power.square()
        total = row_sum(power)
        log_sum = total.log()
        log_probs = (shifted * self._root - log_sum).clamp_min(LOG_FLOOR)
        return self._logits, Softmax(log_probs, maximum * self._root, log_sum), power / total


class Whole(NamedTuple):
    """The student's distribution at temperature 1 over all of its columns, in the parts that `parts_of` makes."""

    log_probs: tuple[Tensor, ...]  # floored
    probs: tuple[Tensor, ...]
    maximum: Tensor  # [n, 1], of all columns, as the next
    log_sum: Tensor


def parts_of(raw: Tensor, shared: int) -> tuple[Tensor, ...]:
    """The first `shared` columns of `[n, V]`, and the rest if there is one; views."""
    return (raw,) if shared == raw.shape[1] else (raw[:, :shared], raw[:, shared:])


def whole_row(student: Softmaxes, rest: Sequence[Tensor]) -> Whole:
    """The student's distribution, from its softmax over the shared columns and the logits of the rest, if any."""
    _, shared, q = student.at(1.0)
    if not rest:
        return Whole((shared.log_probs,), (q,), shared.maximum, shared.log_sum)
    other = softmax(rest[0].clamp_min(_LOWEST))
    maximum = torch.maximum(shared.maximum, other.maximum)
    masses = [(part.maximum - maximum) + part.log_sum for part in (shared, other)]
    log_sum = (masses[0].exp() + masses[1].exp()).log()
    shares = [mass - log_sum for mass in masses]
    log_probs = tuple(
        (part.log_probs + share).clamp_min(LOG_FLOOR) for part, share in zip((shared, other), shares, strict=True)
    )
    return Whole(log_probs, (q * shares[0].exp(), log_probs[1].exp()), maximum, log_sum)
