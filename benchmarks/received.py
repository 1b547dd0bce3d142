"""Counts what collectives bring to this rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Received(TorchDispatchMode):
    """Counts the bytes that a ring brings to this rank while the context lasts, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            ranks = dist.ProcessGroup.unbox(groups[0]).size()
            share = (ranks - 1) / ranks
            factor, tensor = {
                "_allgather_base_": (share, args[0]),
                "allgather_": (share, args[0][0]),  # FSDP1's
                "_reduce_scatter_base_": (share, args[1]),
                "alltoall_base_": (share, args[0]),
                "allreduce_": (2 * share, args[0]),
            }[func._opname]  # any other is not expected
            tensors = [tensor] if isinstance(tensor, Tensor) else tensor
            size = sum(part.numel() * part.element_size() for part in tensors)
            self.by_operation[func._opname] = self.by_operation.get(func._opname, 0.0) + factor * size
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> float:
        """Bytes of all collectives."""
        return sum(self.by_operation.values())
