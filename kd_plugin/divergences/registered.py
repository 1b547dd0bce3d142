"""Divergences that a user adds: an elementwise function is enough, its gradient follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kd_plugin.distill_config import BUILT_IN, registered_names
from kd_plugin.divergences.definition import Divergence, Row, separable

Elementwise = Callable[[Tensor, Tensor], Tensor]


def from_function(name: str, function: Elementwise) -> Divergence:
    """The divergence `sum_v function(log q, log p)`; its slope by forward-mode of the same function."""

    def element(op: Any, row: Row) -> Tensor:
        return function(row.lq, row.lp)

    def slope(op: Any, row: Row) -> Tensor:
        result, pull_back = torch.func.vjp(lambda lq: function(lq, row.lp), row.lq)
        return pull_back(torch.ones_like(result))[0]

    return separable(name, element, slope, formula="registered", gradient_formula="by autograd", source="user")


def check(name: str, function: Elementwise) -> None:
    """Try `function` on a few rows. Raises `ValueError` for a bad name, shape, dtype or NaN."""
    if name in BUILT_IN:
        raise ValueError(f"divergence {name!r} is built in: register yours under another name")
    if not name.isidentifier():
        raise ValueError(f"divergence name {name!r}: wanted letters, digits and underscores, e.g. 'my_kl'")
    p = torch.log_softmax(torch.linspace(-4, 4, 15).view(3, 5), -1)
    q = torch.log_softmax(torch.linspace(3, -3, 15).view(3, 5).sin(), -1)
    for what, log_q in (("unequal", q), ("equal", p)):
        result = function(log_q, p)
        if not isinstance(result, Tensor) or result.shape != p.shape or result.dtype != p.dtype:
            found = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"divergence {name!r} returned {found} for inputs (3, 5) torch.float32: it must be elementwise, "
                "function(log_q, log_p) -> the same shape; the sum over the vocabulary is taken for you"
            )
        row = Row(log_q, p, log_q, p, log_q.exp(), p.exp(), 5)
        slope = from_function(name, function).elements(torch, row)[1]
        if not (result.isfinite().all() and slope.isfinite().all()):
            raise ValueError(
                f"divergence {name!r} gives NaN or infinity on {what} inputs (value or gradient): "
                "work with the logarithms, e.g. log_p.exp() * (log_p - log_q)"
            )


_functions: dict[str, Elementwise] = {}


def remember(name: str, function: Elementwise) -> None:
    """Let configurations name it."""
    _functions[name] = function
    registered_names.add(name)


def value(name: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """The registered function itself, elementwise."""
    return _functions[name](log_q, log_p)
