"""Watches over what is put around an attached student: DDP that is called past, and the first step of FSDP units.

DDP prepares the reduction of gradients in its own forward. Through `ddp.module(...)` every rank trains alone, and
nothing fails. Other wrappers need no such guard: FSDP2 is the module itself, FSDP1 leaves flat weights that nothing
can be multiplied by, and DeepSpeed's engine reduces what `engine.backward` finds, whoever called the forward.

The gather of an FSDP unit is a pre-hook that FSDP2 puts before all others, or the forward of FSDP1's wrapper, and both
are made after `attach`. Only torch's global pre-hooks run earlier; as they run for every module, ours soon goes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kd_plugin.distributed.layout import is_fsdp_unit
from kd_plugin.distributed.torch_internals import runs_outside_ddp
from kd_plugin.distributed.uncompiled import uncompiled

__all__ = ["BypassWatch", "before_first_step"]

logger = logging.getLogger(__name__)


class BypassWatch:
    """Knows the DDP wrapper that is put around `model`, before or after this is made.

    Args:
        model: the innermost module.
        outermost: what the user has, perhaps a wrapper already.
    """

    def __init__(self, model: nn.Module, outermost: object) -> None:
        self._model = weakref.ref(model)
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._warned = False
        if isinstance(outermost, DistributedDataParallel):
            self._wrapper = weakref.ref(outermost)
        _watches.add(self)
        _listen()

    def remove(self) -> None:
        """Look for wrappers no longer."""
        _watches.discard(self)
        _listen()

    def look_at(self, wrapper: DistributedDataParallel, child: nn.Module | None) -> None:
        """A DDP wrapper is being put around `child`."""
        model = self._model()
        if child is not None and any(module is model for module in child.modules()):
            self._wrapper = weakref.ref(wrapper)

    def check(self) -> None:
        """Called in each forward of the student: warn, once, if its gradients will stay on this rank."""
        if self._warned or self._wrapper is None or not torch.is_grad_enabled():
            return
        wrapper, model = self._wrapper(), self._model()
        if wrapper is None or model is None or not model.training:
            return
        if runs_outside_ddp(wrapper):
            self._warned = True
            logger.warning(
                "the student is called past its DistributedDataParallel wrapper, so each rank keeps its own gradients "
                "and the ranks drift apart: call the wrapper, ddp(input_ids, labels=...), not ddp.module(...)"
            )


_watches: weakref.WeakSet[BypassWatch] = weakref.WeakSet()
_handles: list[RemovableHandle] = []
"""The handle of torch's one hook for all watches: a plugin that is dropped without detach() leaves nothing more behind,
and the hook goes with the next one that is detached."""


def _listen() -> None:
    """Hear of modules that are put into others as long as there is a watch."""
    if _watches and not _handles:
        _handles.append(register_module_module_registration_hook(_heard))
    elif not _watches and _handles:
        _handles.pop().remove()


def _heard(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module":
        for watch in list(_watches):
            watch.look_at(parent, child)


def before_first_step(inner: nn.Module, act: Callable[[], None]) -> Callable[[], None]:
    """Wait for the first call, with gradients, of a module that holds `inner`; call `act` if FSDP units are around it.

    All ranks take part in such a call, so `act` may be collective. Without gradients a rank may be alone.

    Args:
        inner: a module; not kept alive.
        act: a bound method; what it belongs to is not kept alive either. If it raises, the next call is waited for.

    Returns:
        What ends the waiting.
    """
    held, action = weakref.ref(inner), weakref.WeakMethod(act)

    @uncompiled
    def hook(module: nn.Module, _args: object) -> None:
        part, do = held(), action()
        if part is None or do is None:
            handle.remove()
        elif torch.is_grad_enabled() and _holds(module, part):
            # Judged by the types of modules, which all ranks share: of a small head some ranks hold nothing.
            if any(is_fsdp_unit(unit) and _holds(unit, part) for unit in module.modules()):
                do()
            handle.remove()

    handle = register_module_forward_pre_hook(hook)
    return handle.remove


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inside is part for inside in module.modules())
