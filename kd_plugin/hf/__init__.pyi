from .trainer import DistillTrainer as DistillTrainer
from .trainer import DistillTrainerMixin as DistillTrainerMixin
