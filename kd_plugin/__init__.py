"""kd_plugin: attach a teacher to a student and train under DeepSpeed or FSDP as before.

Names are resolved on first use, so that `kd-plugin validate` answers without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_plugin import reference as reference
    from kd_plugin.collectives import CollectiveError as CollectiveError
    from kd_plugin.config import DistillConfig as DistillConfig
    from kd_plugin.config import RunConfig as RunConfig
    from kd_plugin.config_file import ConfigError as ConfigError
    from kd_plugin.config_file import load_config as load_config
    from kd_plugin.divergences import register_divergence as register_divergence
    from kd_plugin.fused_loss import distill_loss as distill_loss
    from kd_plugin.head import DistillHead as DistillHead
    from kd_plugin.logits_loss import distill_logits as distill_logits
    from kd_plugin.output import DistillOutput as DistillOutput
    from kd_plugin.plugin import Plugin as Plugin
    from kd_plugin.plugin import attach as attach
    from kd_plugin.teachers import HeadTeacher as HeadTeacher
    from kd_plugin.teachers import ShardedLogits as ShardedLogits
    from kd_plugin.token_losses import distill_loss_per_token as distill_loss_per_token
    from kd_plugin.training import train as train

__version__ = "0.1.0"

_HOMES = {
    "CollectiveError": "collectives",
    "ConfigError": "config_file",
    "DistillConfig": "config",
    "DistillHead": "head",
    "DistillOutput": "fused_loss",
    "HeadTeacher": "teachers",
    "Plugin": "plugin",
    "RunConfig": "config",
    "ShardedLogits": "teachers",
    "attach": "plugin",
    "distill_logits": "logits_loss",
    "distill_loss": "fused_loss",
    "distill_loss_per_token": "token_losses",
    "load_config": "config_file",
    "reference": "",
    "register_divergence": "divergences",
    "train": "training",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kd_plugin' has no attribute {name!r}")
    home = importlib.import_module(f"kd_plugin.{_HOMES[name] or name}")
    value = getattr(home, name) if _HOMES[name] else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
