"""What the training loop asks of a parallel backend, and what all backends share.

Notable decisions:
- three adapters stand behind one protocol: FSDP2 (which also serves one process and DDP's layout, so that all
  three compute in the same precision), FSDP1 and DeepSpeed;
- the loss arrives divided by the valid tokens of the whole step over all ranks, so an adapter only has to
  undo its backend's averaging over ranks;
- host numbers (token counts, memory) are reduced over gloo also on GPUs, so that counting never waits for
  the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "Engine", "EngineError", "parameter_groups"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineError(ValueError):
    """The launch and the training settings do not fit together."""


class Engine(Protocol):
    """A student and a teacher on their devices, and the optimizer that trains the student."""

    student: nn.Module
    """What to call: the sharded student, or DeepSpeed's engine around it."""
    teacher: nn.Module
    module: nn.Module
    """The Hugging Face student itself, whose forward the plugin owns."""
    torch_optimizer: torch.optim.Optimizer | None
    """Whose state is this rank's, without padding; None where only its backend knows that (DeepSpeed)."""
    applied_notes: list[str]
    """Lines for the log: what was filled in or could not be applied."""

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> Tensor:
        """One micro-batch: its loss, summed and divided by `num_items`, into the gradients; returns it (0-d)."""
        ...

    def step(self, learning_rate: float) -> Tensor | None:
        """One optimizer step at this rate; returns the global gradient norm before clipping (0-d), if it is known."""
        ...

    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> Tensor:
        """The forward pass of one held-out micro-batch; its numbers are in the plugin's metrics. Returns its loss."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole student on rank 0's CPU (empty elsewhere). All ranks must call this."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer into `folder`. All ranks must call this."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. All ranks must call this."""
        ...


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) do not.

    Call this before DeepSpeed or FSDP: a ZeRO-3 parameter is flat and would look like a vector.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise EngineError("the student has no trainable parameter: student.freeze matches all of them")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
