"""torch.compile left out: on purpose, with the types of what is left out kept, or because it fails, which is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., object])


def uncompiled(function: _Function) -> _Function:
    """`torch.compiler.disable` for a function and all that it calls."""
    return cast("_Function", torch.compiler.disable(function))


def say_eager(subject: str, error: Exception, cure: str) -> None:
    """Warn that torch.compile has failed on one of `subject` with `error`, and that it is left out from now on."""
    reason = " ".join(str(error).split("\n")[:2])
    logger.warning(
        "%s: torch %s cannot compile one (%s: %s), which runs eager now; try another release of torch, or %s",
        *(subject, torch.__version__, type(error).__name__, reason, cure),
    )
