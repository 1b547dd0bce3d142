"""What checkpoints of a student with adapters leave out: the weights that `student.lora` freezes.

They are where the student comes from, and load as fast from there. That they are the same then is looked at: a
checkpoint has a digest of some of their numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.engines.protocol import EngineError
from kd_plugin.settings.run import RunConfig

__all__ = ["LeftOut"]

_LOOKED_AT = 1024  # numbers of each weight, evenly spaced


class LeftOut:
    """The frozen weights of a student with adapters; nothing of any other student.

    Args:
        student: not sharded yet.
        config: the run.
    """

    def __init__(self, student: nn.Module, config: RunConfig) -> None:
        self.names: frozenset[str] = frozenset()
        """Of the weights, tied ones under each of theirs."""
        self.digest = ""
        """Of their names, shapes and some of their numbers; empty where nothing is left out."""
        if config.student.lora is not None:
            named = student.named_parameters(remove_duplicate=False)
            frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
            self.names, self.digest = frozenset(frozen), _digest(frozen)

    def without(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a state dict that a checkpoint has."""
        return {name: value for name, value in state.items() if name not in self.names}

    def check(self, digest: str, folder: Path) -> None:
        """Compare with the digest in the checkpoint in `folder`. One collective.

        Raises:
            EngineError: on all ranks, where any rank has other weights.
        """
        if not self.names:
            return
        different = {"ranks whose frozen weights are others than a checkpoint's": float(digest != self.digest)}
        if reduce_numbers(different, op="max").popitem()[1]:
            raise EngineError(
                f"{folder} has adapters only, and the frozen weights of the student are others than those it was "
                "trained on: name the model that it was trained on in student.model (and student.revision)"
            )


def _digest(weights: Mapping[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _LOOKED_AT)].double().cpu()
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
