"""A module that is tried out, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kd_plugin.distributed.torch_internals import times_written

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run the body with `module` in eval mode; its modes, buffers, plain attributes and random numbers come back.

    Some models remember the length or the expert capacity of their last call, and go by it in the next; running means
    and the vectors of `spectral_norm` are written in training mode.
    """
    before = [(part, _plain_attributes(part), dict(part._buffers)) for part in module.modules()]
    values = [
        (buffer, times_written(buffer), buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()
    ]
    device = next(module.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            module.eval()
            yield
    finally:
        for part, attributes, buffers in before:
            for name in _plain_attributes(part).keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
            part._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, value in values:  # written in place
                if times_written(buffer) != version:
                    buffer.copy_(value)


def _plain_attributes(module: nn.Module) -> dict[str, bool | int | float | str | None]:
    return {name: value for name, value in module.__dict__.items() if isinstance(value, _PLAIN)}
