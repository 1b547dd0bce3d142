"""Something to do before the first call of an FSDP model, whose units gather their parameters before any forward.

A unit's gather is a pre-hook that FSDP2 puts before all others, or the forward of FSDP1's wrapper, and both are
made after `attach`. Only torch's global pre-hooks run earlier; this one takes itself off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.module import register_module_forward_pre_hook


class BeforeFirstCall:
    """Calls `act` when a module that holds `inner` is called and FSDP units hold it, once, unless it raises.

    Every such call is collective anyway, so `act` may be; any other call may be one rank's own.

    Args:
        inner: a module.
        act: a bound method; what it belongs to is not kept alive.
    """

    def __init__(self, inner: nn.Module, act: Callable[[], None]) -> None:
        self._inner = weakref.ref(inner)
        found, own = weakref.WeakMethod(act), weakref.ref(self)

        @torch.compiler.disable
        def hook(module: nn.Module, _args: Any) -> None:
            this, action = own(), found()
            if this is None or action is None:
                handle.remove()
            elif this._held_by_units_of(module):
                action()
                handle.remove()

        handle = register_module_forward_pre_hook(hook)
        self.remove: Callable[[], None] = handle.remove
        """Wait no longer."""

    def _held_by_units_of(self, module: nn.Module) -> bool:
        """Asked of types only: which rows a rank holds, and whether any, is not the same on all."""
        inner, units = self._inner(), (FSDPModule, FullyShardedDataParallel)
        held = [part for part in module.modules() if isinstance(part, units)]
        return any(part is inner for unit in held for part in unit.modules())


__all__ = ["BeforeFirstCall"]
