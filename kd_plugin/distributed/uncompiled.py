"""torch.compile left out, with the types of what is left out kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def uncompiled(function: _Function) -> _Function:
    """`torch.compiler.disable` for a function and all that it calls."""
    return cast("_Function", torch.compiler.disable(function))
