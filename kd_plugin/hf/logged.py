"""What a trainer logs of the distillation, under the names that every tracker gets through `Trainer.log`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kd_plugin.settings.run import DistillConfig
from kd_plugin.training.memory import memory_readings

if TYPE_CHECKING:
    from accelerate import Accelerator

_MEMORY = ("logits_avoided_gib", "loss_peak_gib")
_SETTINGS = ("temperature", "chunk_size")


def is_training_log(logs: Mapping[str, float]) -> bool:
    """Whether this is what the training loop logs, on every rank; other calls may be of one rank alone."""
    return "loss" in logs and "learning_rate" in logs


def of_training(measured: Mapping[str, float], distill: DistillConfig, accelerator: Accelerator) -> dict[str, float]:
    """The numbers of a window of steps, and the peak memory of the largest rank. One collective.

    Args:
        measured: what `Plugin.metrics` has said of the window.
        distill: the objective.
        accelerator: knows the other ranks.
    """
    kept = {name: value for name, value in measured.items() if name not in _SETTINGS and not name.endswith("_ms")}
    for name, weight in (("soft_loss", distill.soft_weight), ("hard_loss", distill.hard_weight)):
        if not weight:
            kept.pop(name, None)  # not computed, so its 0 says nothing
    return kept | _peaks(accelerator)


def _peaks(accelerator: Accelerator) -> dict[str, float]:
    readings = memory_readings()
    own = torch.tensor(list(readings.values()), dtype=torch.float32, device=accelerator.device)
    everyone = accelerator.gather(own)
    assert isinstance(everyone, torch.Tensor)
    return dict(zip(readings, everyone.view(-1, len(readings)).amax(0).tolist(), strict=True))


def evaluation_objective(distill: DistillConfig) -> DistillConfig:
    """The objective of an evaluation: that of the training, with everything measured, cross-entropy included."""
    return distill.model_copy(update={"metrics": True, "hard_weight": distill.hard_weight or 1.0})


def of_evaluation(measured: Mapping[str, float], distill: DistillConfig, prefix: str) -> dict[str, float]:
    """The numbers of one evaluation with `evaluation_objective(distill)`; the loss is that of `distill`."""
    unwanted = (*_SETTINGS, *_MEMORY, *(() if distill.soft_weight else ("soft_loss",)))
    kept = {name: value for name, value in measured.items() if name not in unwanted and not name.endswith("_ms")}
    if not distill.hard_weight:
        kept["loss"] -= kept["hard_loss"]
    return {f"{prefix}_{name}": value for name, value in kept.items()}
