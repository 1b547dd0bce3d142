"""Something to do before the first step of an FSDP model, whose units gather their parameters before any forward.

A unit's gather is a pre-hook that FSDP2 puts before all others, or the forward of FSDP1's wrapper, and both are
made after `attach`. Only torch's global pre-hooks run earlier; as they run for every module, this one soon goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.module import register_module_forward_pre_hook


def before_first_step(inner: nn.Module, act: Callable[[], None]) -> Callable[[], None]:
    """Wait for the first call, with gradients, of a module that holds `inner`; call `act` if FSDP units are around it.

    All ranks take part in such a call, so `act` may be collective. Without gradients a rank may be alone.

    Args:
        inner: a module; not kept alive.
        act: a bound method; what it belongs to is not kept alive either. If it raises, the next call is waited for.

    Returns:
        What ends the waiting.
    """
    found, action = weakref.ref(inner), weakref.WeakMethod(act)

    @torch.compiler.disable
    def hook(module: nn.Module, _args: Any) -> None:
        part, do = found(), action()
        if part is None or do is None:
            handle.remove()
        elif torch.is_grad_enabled() and _holds(module, part):
            # Types are the same on all ranks; which rows a rank has, and whether any, is not.
            units = (FSDPModule, FullyShardedDataParallel)
            if any(isinstance(unit, units) and _holds(unit, part) for unit in module.modules()):
                do()
            handle.remove()

    handle = register_module_forward_pre_hook(hook)
    return handle.remove


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(found is part for found in module.modules())


__all__ = ["before_first_step"]
