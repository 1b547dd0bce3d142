"""What of the Hugging Face libraries does not go with a teacher: each is refused by name, before anything trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd_plugin.plugin.labels import OWN_IGNORE_INDEX
from kd_plugin.settings.run import DistillConfig

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["UnsupportedError", "refuse_arguments", "refuse_parallelism"]


class UnsupportedError(ValueError):
    """An option of a trainer under which the student would not be distilled as asked."""


def refuse_arguments(args: Any, compute_loss_func: object, distill: DistillConfig) -> None:
    """Look at what a trainer is about to be made with.

    Args:
        args: the TrainingArguments, or None.
        compute_loss_func: the trainer's argument of that name.
        distill: the objective.

    Raises:
        UnsupportedError: an option takes the loss or the labels away, or splits what one rank has to see whole.
    """
    if compute_loss_func is not None:
        raise UnsupportedError(
            "compute_loss_func would replace the distillation loss: leave it out, and say what is wanted in `distill` "
            "(kd_plugin.register_divergence takes a loss of your own)"
        )
    if distill.ignore_index != OWN_IGNORE_INDEX:
        raise UnsupportedError(
            f"distill.ignore_index is {distill.ignore_index}, and the Trainer counts every label but -100: leave it "
            "at -100, and let the collator write that"
        )
    if args is None:
        return
    if factor := args.label_smoothing_factor:
        raise UnsupportedError(
            f"label_smoothing_factor={factor} would take the labels away from the student: set it to 0, and "
            f"DistillConfig(label_smoothing={factor}) for the hard loss"
        )
    if args.use_liger_kernel:
        raise UnsupportedError(
            "use_liger_kernel replaces the student's forward when training starts, and the distillation loss with it: "
            "leave it out (Liger's layer kernels can be put into the model before the trainer is made)"
        )
    if (kind := getattr(args, "loss_type", "nll")) not in ("nll", None):
        raise UnsupportedError(
            f"loss_type={kind!r} is a loss of TRL's, which the distillation loss replaces: leave it out"
        )
    _refuse_mesh(args.parallelism_config)


def refuse_parallelism(trainer: Trainer) -> None:
    """Look at how a trainer that has just been made will run its student.

    Raises:
        UnsupportedError: in a way in which the distillation loss would be wrong, or past it.
    """
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f"nn.DataParallel over {trainer.args.n_gpu} GPUs would copy the student without its teacher: start one "
            "process for each GPU (torchrun, accelerate launch), or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
        )
    _refuse_mesh(getattr(trainer.accelerator, "parallelism_config", None))
    if getattr(trainer, "is_distributed_loading_by_transformers", False) or trainer.get_tp_size() > 1:
        raise UnsupportedError(
            "the student was sharded when it was loaded (distributed_config, tp_plan) or is tensor-parallel: load it "
            "whole, and let the Trainer shard it (fsdp, deepspeed)"
        )
    kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    if kind == "MEGATRON_LM" or trainer.is_fsdp_xla_enabled:
        raise UnsupportedError(f"{kind} cuts the student in a way that kd_plugin does not know: use fsdp or deepspeed")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise UnsupportedError(
            f"FSDP version {plugin.fsdp_version} is not distilled through the Trainer: set fsdp_config={{'version': 2}}"
        )


def _refuse_mesh(mesh: Any) -> None:
    """Raise UnsupportedError for accelerate's ParallelismConfig with parallelism within a sequence or a layer."""
    named = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
    for name, kind in named.items():
        if (size := getattr(mesh, name, 1) or 1) > 1:
            raise UnsupportedError(
                f"{name}={size}: under {kind} parallelism no rank sees the sequences and the head as the loss needs "
                f"them: set {name}=1, and shard with dp_shard_size (FSDP2) or ZeRO-3"
            )
