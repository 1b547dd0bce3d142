"""kd_plugin: attach a teacher to a student and train under DeepSpeed or FSDP as before.

Names are resolved on first use, so that `kd-plugin validate` answers without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin.distributed.collectives import CollectiveError as CollectiveError
    from kd_plugin.divergences.registry import register_divergence as register_divergence
    from kd_plugin.exchange.sharded_teachers import ShardedLogits as ShardedLogits
    from kd_plugin.loss import reference as reference
    from kd_plugin.loss.from_hidden import distill_loss as distill_loss
    from kd_plugin.loss.from_logits import distill_logits as distill_logits
    from kd_plugin.loss.output import DistillOutput as DistillOutput
    from kd_plugin.loss.per_token import distill_loss_per_token as distill_loss_per_token
    from kd_plugin.loss.teacher import HeadTeacher as HeadTeacher
    from kd_plugin.plugin.attach import Plugin as Plugin
    from kd_plugin.plugin.attach import attach as attach
    from kd_plugin.plugin.head import DistillHead as DistillHead
    from kd_plugin.settings.run import DistillConfig as DistillConfig
    from kd_plugin.settings.run import RunConfig as RunConfig
    from kd_plugin.settings.yaml_file import ConfigError as ConfigError
    from kd_plugin.settings.yaml_file import load_config as load_config
    from kd_plugin.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "CollectiveError": "distributed.collectives",
    "ConfigError": "settings.yaml_file",
    "DistillConfig": "settings.run",
    "DistillHead": "plugin.head",
    "DistillOutput": "loss.output",
    "HeadTeacher": "loss.teacher",
    "Plugin": "plugin.attach",
    "RunConfig": "settings.run",
    "ShardedLogits": "exchange.sharded_teachers",
    "attach": "plugin.attach",
    "distill_logits": "loss.from_logits",
    "distill_loss": "loss.from_hidden",
    "distill_loss_per_token": "loss.per_token",
    "load_config": "settings.yaml_file",
    "reference": "loss",
    "register_divergence": "divergences.registry",
    "train": "training.run",
}

__all__ = [
    "CollectiveError",
    "ConfigError",
    "DistillConfig",
    "DistillHead",
    "DistillOutput",
    "HeadTeacher",
    "Plugin",
    "RunConfig",
    "ShardedLogits",
    "__version__",
    "attach",
    "distill_logits",
    "distill_loss",
    "distill_loss_per_token",
    "load_config",
    "reference",
    "register_divergence",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kd_plugin' has no attribute {name!r}")
    if name == "reference":  # the one public name that is a module
        value: Any = importlib.import_module("kd_plugin.loss.reference")
    else:
        value = getattr(importlib.import_module(f"kd_plugin.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
