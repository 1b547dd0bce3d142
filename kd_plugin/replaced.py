"""A module's forward, replaced for a while."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from kd_plugin.collectives import of_others

logger = logging.getLogger(__name__)


class ReplacedForward:
    """Stands in `module.forward` until `restore`; a copy of the module gets its own class's forward back.

    An instance attribute, which every wrapper honours, instead of a class: `type(module)` is what
    `save_pretrained` writes down.
    """

    def __init__(self, module: nn.Module, replacement: Callable[..., Any]) -> None:
        self._module = module
        self._own = module.__dict__.get("forward")
        self._original = module.forward
        self._replacement = replacement
        self._active = True
        functools.update_wrapper(self, self._original)  # the Hugging Face Trainer reads the signature
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement while active, afterwards the original."""
        return (self._replacement if self._active else self._original)(*args, **kwargs)

    def restore(self) -> None:
        """Put back what was there, unless something has been put on top meanwhile: then only step aside."""
        self._active = False
        if self._module.__dict__.get("forward") is not self:
            logger.warning("the forward of %s was replaced after attach(); it stays", type(self._module).__name__)
        elif self._own is None:
            del self._module.forward
        else:
            self._module.forward = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        if copied is None or self._own is not None:
            raise ValueError("a model with a teacher attached cannot be copied as it is: call plugin.detach() first")
        return MethodType(type(copied).forward, copied)  # the copy is a plain model, e.g. for weight averaging

    def __reduce__(self) -> Any:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


class NamedCall:
    """Names what fails in the collectives of FSDP2 and ZeRO-3, which gather in hooks around `module.forward`.

    It stands in the module's whole call until `restore`. torch looks its implementation up on the instance; if it
    ceases to, those failures keep the backend's words.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        module.__dict__["_call_impl"] = self

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call."""
        with of_others("around its forward"):
            return type(self._module)._call_impl(self._module, *args, **kwargs)

    def restore(self) -> None:
        """Step out."""
        if self._module.__dict__.get("_call_impl") is self:
            del self._module.__dict__["_call_impl"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._module)]  # the module, whose attributes these are
        return MethodType(type(copied)._call_impl, copied)

    def __reduce__(self) -> Any:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


def is_replaced(module: nn.Module) -> bool:
    """Whether a plugin stands in this module's forward."""
    return isinstance(module.__dict__.get("forward"), ReplacedForward)
