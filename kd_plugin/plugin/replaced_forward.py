"""A module's forward, replaced for a while."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from kd_plugin.distributed.collectives import named_in_wrapper
from kd_plugin.distributed.torch_internals import replace_whole_call, restore_whole_call, whole_call

logger = logging.getLogger(__name__)

_ACCELERATE = "_old_forward"
"""Where accelerate keeps a module's own forward, which its hooks call once they have brought the weights."""


class ReplacedForward:
    """Stands in `module.forward` until `restore`; a copy of the module gets its own class's forward back.

    An instance attribute, which every wrapper honours, instead of a class: `type(module)` is what
    `save_pretrained` writes down.

    Args:
        module: whose forward is replaced.
        replacement: takes the arguments of the forward.
        attribute: the instance attribute to stand in; another than `forward` where a library keeps the forward
            that it calls elsewhere (see `innermost`).
    """

    def __init__(self, module: nn.Module, replacement: Callable[..., Any], attribute: str = "forward") -> None:
        self._module, self._attribute = module, attribute
        self._own = module.__dict__.get(attribute)
        self.original: Callable[..., Any] = getattr(module, attribute)
        """What runs where the replacement does not."""
        self._replacement = replacement
        self.active = True
        """False once it has stepped aside."""
        # The Hugging Face Trainer reads the signature; the attributes of another such object are not to be taken over.
        functools.update_wrapper(self, self.original, updated=())
        setattr(module, attribute, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement while active, afterwards the original.

        accelerate's `unwrap_model` binds whatever it finds under its own wrapper to the module a second time; the
        module then comes as the first argument, which it never is otherwise.
        """
        if args and args[0] is self._module:
            args = args[1:]
        return (self._replacement if self.active else self.original)(*args, **kwargs)

    def restore(self) -> None:
        """Put back what was there, unless something has been put on top meanwhile: then only step aside."""
        self.active = False
        there = self._module.__dict__.get(self._attribute)
        if there is not self and getattr(there, "__func__", None) is not self:
            logger.warning("the forward of %s was replaced after attach(); it stays", type(self._module).__name__)
        elif self._own is None:
            delattr(self._module, self._attribute)
        else:
            setattr(self._module, self._attribute, self._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        copied = memo.get(id(self._module))
        if copied is None or self._own is not None:
            raise ValueError("a model with a teacher attached cannot be copied as it is: call plugin.detach() first")
        return MethodType(type(copied).forward, copied)  # the copy is a plain model, e.g. for weight averaging

    def __reduce__(self) -> NoReturn:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


class NamedCall:
    """Names what fails in the collectives of FSDP2 and ZeRO-3, which gather in hooks around `module.forward`.

    It stands in the module's whole call until `restore`. torch looks its implementation up on the instance; if it
    ceases to, those failures keep the backend's words.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        replace_whole_call(module, self)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call."""
        own = whole_call(self._module)
        assert own is not None, "torch has called this in its place"
        with named_in_wrapper("around its forward"):
            return own(*args, **kwargs)

    def restore(self) -> None:
        """Give the module its own call back."""
        restore_whole_call(self._module, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any] | None:
        return whole_call(memo[id(self._module)])  # of the copied module, whose attributes these are

    def __reduce__(self) -> NoReturn:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


def home_of(hook: Any) -> str:
    """Module and name of a hook, whatever wraps it."""
    inner = getattr(hook, "func", hook)  # functools.partial
    inner = getattr(inner, "__wrapped__", inner)
    inner = getattr(inner, "__func__", inner)
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def is_replaced(module: nn.Module) -> bool:
    """Whether a plugin stands in this module's forward, also under what others have wrapped around it since."""
    forward = module.__dict__.get("forward")
    for _ in range(20):  # of accelerate's wrappers each names the next in `__wrapped__`
        if isinstance(forward, ReplacedForward):
            if forward.active:
                return True
            forward = forward._own
        else:
            forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
        if forward is None:
            break
    inner = module.__dict__.get(_ACCELERATE)
    return isinstance(inner, ReplacedForward) and inner.active


def is_patched(module: nn.Module) -> bool:
    """Whether somebody has put another forward into the module than its class has.

    What accelerate wraps around that forward, and torch's autocast in it, is no other.
    """
    forward: Any = module.__dict__.get(innermost(module))
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if function is type(module).forward:
            return False
        home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if not home.startswith(("accelerate.", "torch.")):
            return True
        forward = getattr(function, "__wrapped__", None)
    return innermost(module) in module.__dict__


def innermost(module: nn.Module) -> str:
    """The attribute that holds the forward which runs where the weights are.

    accelerate's offloading keeps weights on the meta device and replaces `forward` by one that brings them, calls
    `_old_forward`, and takes them away again.
    """
    return _ACCELERATE if hasattr(module, "_hf_hook") and _ACCELERATE in module.__dict__ else "forward"
