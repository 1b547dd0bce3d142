"""Divergences that a user adds: an elementwise function is enough, its gradient follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_plugin.divergences.definition import Divergence, Ops, Row, separable
from kd_plugin.settings.distill import BUILT_IN, registered_names

Elementwise = Callable[[Tensor, Tensor], Tensor]


def from_function(name: str, function: Elementwise) -> Divergence:
    """The divergence `sum_v function(log q, log p)`; its slope by forward-mode of the same function."""

    def element(op: Ops, row: Row) -> Tensor:
        return function(row.lq, row.lp)

    def slope(op: Ops, row: Row) -> Tensor:
        result, pull_back = torch.func.vjp(lambda lq: function(lq, row.lp), row.lq)[:2]
        return pull_back(torch.ones_like(result))[0]

    return separable(name, element, slope, formula="registered", gradient_formula="by autograd", source="user")


def check(name: str, function: Elementwise) -> None:
    """Try `function` on a few rows. Raises `ValueError` for a bad name, shape, dtype, value or gradient."""
    if name in BUILT_IN:
        raise ValueError(f"divergence {name!r} is built in: register yours under another name")
    if not name.isidentifier():
        raise ValueError(f"divergence name {name!r}: wanted letters, digits and underscores, e.g. 'my_kl'")
    p = torch.log_softmax(torch.linspace(-4, 4, 15).view(3, 5), -1)
    q = torch.log_softmax(torch.linspace(3, -3, 15).view(3, 5).sin(), -1)
    result = _elementwise(name, function, q, p)
    few = _elementwise(name, function, q[:, :2], p[:, :2])
    if not torch.allclose(few, result[:, :2], equal_nan=True):
        raise ValueError(
            f"divergence {name!r} is not elementwise: it gives other values for the first two tokens alone; "
            "write it token by token, as function(log_q, log_p) of normalised log-probabilities"
        )
    for what, log_q in (("unequal", q), ("equal", p)):
        row = Row(log_q, p, log_q, p, log_q.exp(), p.exp(), 5)
        values, slope = from_function(name, function).elements(torch, row)
        if not (values.isfinite().all() and slope.isfinite().all()):
            raise ValueError(
                f"divergence {name!r} gives NaN or infinity on {what} inputs (value or gradient): "
                "work with the logarithms, e.g. log_p.exp() * (log_p - log_q)"
            )
        if what == "unequal" and not slope.any():
            raise ValueError(f"divergence {name!r} does not depend on log_q, the student: nothing would be trained")


def _elementwise(name: str, function: Elementwise, log_q: Tensor, log_p: Tensor) -> Tensor:
    """`function(log_q, log_p)`, refused unless it is a tensor of the same shape and dtype."""
    wanted = "it must be elementwise, function(log_q, log_p) -> the same shape; the sum over the vocabulary is taken"
    try:
        result = function(log_q, log_p)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"divergence {name!r} fails with {type(error).__name__}: {reason}; {wanted} for you"
        ) from error
    if not isinstance(result, Tensor) or result.shape != log_p.shape or result.dtype != log_p.dtype:
        returned = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        given = f"{tuple(log_p.shape)} {log_p.dtype}"
        raise ValueError(f"divergence {name!r} returned {returned} for inputs {given}: {wanted} for you")
    return result


_functions: dict[str, Elementwise] = {}


def remember(name: str, function: Elementwise) -> None:
    """Let configurations name it."""
    _functions[name] = function
    registered_names.add(name)


def value(name: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """The registered function itself, elementwise. Raises `ValueError` for a name that is not registered."""
    if name not in _functions:
        raise ValueError(f"divergence {name!r} is not registered, and `loss/reference.py` has no formula for it")
    return _functions[name](log_q, log_p)
