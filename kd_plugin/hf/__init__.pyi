from .on_policy import DistillOnPolicyMixin as DistillOnPolicyMixin
from .teacher import place_teacher as place_teacher
from .trainer import DistillTrainer as DistillTrainer
from .trainer import DistillTrainerMixin as DistillTrainerMixin
