from .distributed.collectives import CollectiveError as CollectiveError
from .divergences.registry import register_divergence as register_divergence
from .exchange.sharded_teachers import ShardedLogits as ShardedLogits
from .loss import reference as reference
from .loss.from_hidden import distill_loss as distill_loss
from .loss.from_logits import distill_logits as distill_logits
from .loss.output import DistillOutput as DistillOutput
from .loss.per_token import distill_loss_per_token as distill_loss_per_token
from .loss.teacher import HeadTeacher as HeadTeacher
from .plugin.attach import Plugin as Plugin
from .plugin.attach import attach as attach
from .plugin.head import DistillHead as DistillHead
from .settings.run import DistillConfig as DistillConfig
from .settings.run import RunConfig as RunConfig
from .settings.yaml_file import ConfigError as ConfigError
from .settings.yaml_file import load_config as load_config
from .training.run import train as train

__version__: str
