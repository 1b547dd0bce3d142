"""Models whose weights come after `attach`, as deferred initialisation has it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def later(model: nn.Module) -> Callable[[], None]:
    """Take the weights away as deferred initialisation does; -> what brings them back."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.to("meta")

    def bring() -> None:
        model.to_empty(device="cpu")
        model.load_state_dict(weights)
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        model.tie_weights()

    return bring
