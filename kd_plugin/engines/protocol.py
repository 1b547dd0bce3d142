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
    """The module to call: the sharded student, or DeepSpeed's engine around it."""
    teacher: nn.Module
    """The module to call for the teacher."""
    module: nn.Module
    """The Hugging Face student itself, whose forward the plugin owns."""
    torch_optimizer: torch.optim.Optimizer | None
    """The optimizer, if its state is this rank's without padding; None where only the backend knows (DeepSpeed)."""
    applied_notes: list[str]
    """Lines for the log: what was filled in or could not be applied."""

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> Tensor:
        """Add the gradients of one micro-batch's loss, summed and divided by `num_items`; returns that loss (0-d).

        `is_last` marks the last micro-batch of an optimizer step.
        """
        ...

    def step(self, learning_rate: float) -> Tensor | None:
        """Take one optimizer step; returns the global gradient norm before clipping (0-d), if it is known."""
        ...

    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> Tensor:
        """Run one held-out micro-batch forward; the plugin's metrics have its numbers. Returns its loss (0-d)."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The student's whole state dict on rank 0's CPU, and an empty one elsewhere. All ranks must call this."""
        ...

    def save(self, folder: Path) -> None:
        """Write model (without what `LeftOut` names) and optimizer into `folder`. All ranks must call this."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. All ranks must call this."""
        ...


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) do not.

    Call this before DeepSpeed or FSDP: a ZeRO-3 parameter is flat and would look like a vector.

    Raises:
        EngineError: no parameter is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise EngineError("the student has no trainable parameter: student.freeze matches all of them")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
