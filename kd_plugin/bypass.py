"""Notices a student that is called past the DDP wrapper around it.

DDP prepares the reduction of gradients in its own forward. Through `ddp.module(...)` every rank trains alone, and
nothing fails. Other wrappers need no such guard: FSDP2 is the module itself, FSDP1 leaves flat weights that nothing
can be multiplied by, and DeepSpeed's engine reduces what `engine.backward` finds, whoever called the forward.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class BypassWatch:
    """Knows the DDP wrapper that is put around `model`, before or after this is made.

    Args:
        model: the innermost module.
        outermost: what the user has, perhaps a wrapper already.
    """

    def __init__(self, model: nn.Module, outermost: Any) -> None:
        self._model = weakref.ref(model)
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._warned = False
        if isinstance(outermost, DistributedDataParallel):
            self._wrapper = weakref.ref(outermost)
        found = weakref.WeakMethod(self._look_at)

        def hook(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            look_at = found()
            if look_at is not None and isinstance(parent, DistributedDataParallel) and name == "module":
                look_at(parent, child)

        self.remove: Callable[[], None] = register_module_module_registration_hook(hook).remove
        """Look for wrappers no longer."""

    def _look_at(self, wrapper: DistributedDataParallel, child: nn.Module | None) -> None:
        model = self._model()
        if child is not None and any(module is model for module in child.modules()):
            self._wrapper = weakref.ref(wrapper)

    def check(self) -> None:
        """Called in each forward of the student: warn, once, if its gradients will stay on this rank."""
        if self._warned or self._wrapper is None or not torch.is_grad_enabled():
            return
        wrapper, model = self._wrapper(), self._model()
        if wrapper is None or model is None or not model.training or wrapper._use_python_reducer:
            return
        if DistributedDataParallel._get_active_ddp_module() is None:
            self._warned = True
            logger.warning(
                "the student is called past its DistributedDataParallel wrapper, so each rank keeps its own gradients "
                "and the ranks drift apart: call the wrapper, ddp(input_ids, labels=...), not ddp.module(...)"
            )
