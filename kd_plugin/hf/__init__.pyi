from .on_policy import DistillOnPolicyMixin as DistillOnPolicyMixin
from .trainer import DistillTrainer as DistillTrainer
from .trainer import DistillTrainerMixin as DistillTrainerMixin
