"""Which collectives one training step calls, seen by PyTorch's dispatcher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One call."""

    phase: str
    operation: str  # e.g. _allgather_base_
    parameter: str  # the watched parameter whose shard was sent, or ""
    numel: int  # elements sent


class CollectiveLog(TorchDispatchMode):
    """Records every collective while entered; `watched` are FSDP2 parameters to be recognised by their values."""

    def __init__(self, watched: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.shards = {name: shard.detach().clone() for name, shard in (watched or {}).items()}
        self.phase = ""
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            sent = tensors[1] if len(tensors) > 1 else args[0]
            while not isinstance(sent, Tensor):  # some take a list of tensors, or of lists
                sent = sent[0]
            self.calls.append(Collective(self.phase, func._opname, self._name(sent), sent.numel()))
        return func(*args, **(kwargs or {}))

    def _name(self, sent: Tensor) -> str:
        flat = sent.flatten()
        for name, shard in self.shards.items():
            # The last ranks send a shorter shard, padded.
            if shard.numel() <= flat.numel() and torch.equal(flat[: shard.numel()], shard.flatten()):
                return name
        return ""


def local_shard(module: nn.Module) -> Tensor:
    """This rank's rows of `module.weight`."""
    assert isinstance(module.weight, DTensor)
    return module.weight.to_local()
