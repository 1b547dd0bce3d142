"""The DeepSpeed adapter: ZeRO 0 to 3 for the student, a ZeRO-3 engine without optimizer for the teacher.

Notable decisions:
- the optimizer is torch.optim.AdamW given by us (no compilation of an extension), unless the `deepspeed:`
  block names one, which DeepSpeed then builds on our parameter groups;
- `engine.backward(..., scale_wrt_gas=False)`: the loss is already divided by the tokens of the whole step;
- DeepSpeed casts a half-precision model with `.bfloat16()`, buffers included. Rotary frequencies in bf16 are
  another model, so buffers are put back as they were.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.distributed.bars import said_if_slow
from kd_plugin.distributed.layout import is_zero3
from kd_plugin.engines import zero_block
from kd_plugin.engines.left_out import LeftOut
from kd_plugin.engines.process_group import Placement
from kd_plugin.engines.protocol import EngineError, parameter_groups
from kd_plugin.settings.run import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DeepSpeedEngine", "deepspeed_settings", "shard_teacher"]

_TAG, _LEFT_OUT = "state", "left_out"


class DeepSpeedEngine:
    """An `Engine` with student and teacher under DeepSpeed; it lives inside `deepspeed_settings()`."""

    torch_optimizer: torch.optim.Optimizer | None
    teacher: nn.Module

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, config: RunConfig, place: Placement, accumulation: int
    ) -> None:
        if config.student.dtype == "float16" and place.device.type == "cpu":
            raise EngineError("student.dtype float16 under DeepSpeed needs a GPU: use bfloat16 or float32 on CPU")
        deepspeed = _import_deepspeed()
        self.module: nn.Module = student
        self.place, self.torch_optimizer = place, None
        self._left_out = LeftOut(student, config)
        self.config, self.applied_notes = zero_block.student_config(
            config,
            world_size=place.world_size,
            accumulation=accumulation,
            hidden_size=student.config.get_text_config().hidden_size,
        )
        self.student = _initialize(deepspeed, student, config=self.config, **self._optimizer(student, config))
        _forget_warm_up_step(self.student.basic_optimizer)
        self.teacher = self._place_teacher(teacher, config)

    def _optimizer(self, student: nn.Module, config: RunConfig) -> dict[str, Any]:
        """What DeepSpeed is given: an optimizer, or parameters for the one that the `deepspeed:` block names."""
        train = config.train
        groups = parameter_groups(student, train.weight_decay)
        if self.config.get("optimizer"):
            return {"model_parameters": groups}
        # lr 0 until the first step: some of DeepSpeed's wrappers make states by a step on zero gradients.
        settings = {"betas": train.adam_betas, "eps": train.adam_eps, "fused": train.optimizer == "adamw_fused"}
        return {"optimizer": torch.optim.AdamW(groups, lr=0.0, **settings)}

    def _place_teacher(self, teacher: nn.Module, config: RunConfig) -> nn.Module:
        teacher.requires_grad_(False).eval()
        if not zero_block.shards_teacher(config, self.place.world_size):
            return teacher.to(self.place.device)
        return shard_teacher(teacher, self.config, precision=config.teacher.dtype, offload=config.teacher.offload)

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> Tensor:
        """Run one micro-batch; its gradients are scaled by world_size, because DeepSpeed averages them over ranks."""
        self.student.set_gradient_accumulation_boundary(is_last)
        loss = self.student(**inputs, num_items_in_batch=num_items).loss
        self.student.backward(loss * self.place.world_size, scale_wrt_gas=False)
        return loss.detach()

    def step(self, learning_rate: float) -> Tensor | None:
        """Take DeepSpeed's step; no norm is known where the `deepspeed:` block says that none is computed.

        Raises:
            EngineError: fp16's gradients overflow at any loss scale.
        """
        for group in self.student.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._plain_norm()
        try:
            self.student.step()
        except Exception as error:  # of no kind of its own
            if "loss scale already at minimum" not in str(error):
                raise
            raise EngineError(
                "the student's gradients overflow at any loss scale of DeepSpeed's: lower train.learning_rate, or use "
                "bfloat16 (student.dtype)"
            ) from error
        norm = norm if norm is not None else self.student.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def _plain_norm(self) -> Tensor | None:
        """The norm where DeepSpeed computes none: stage 0 in fp32, with gradients already averaged."""
        if isinstance(self.student.optimizer, torch.optim.Optimizer):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return None

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> Tensor:
        """Run one held-out micro-batch through DeepSpeed's engine, without gradients."""
        return self.student(**inputs, num_items_in_batch=num_items).loss

    def full_state_dict(self) -> dict[str, Tensor]:
        """Copy the student to rank 0's CPU; ZeRO-3 parameters are gathered one at a time."""
        import deepspeed

        full: dict[str, Tensor] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            parts = [value] if is_zero3(value) else []
            with deepspeed.zero.GatheredParameters(parts):
                if self.place.rank == 0:
                    full[name] = value.detach().cpu().clone()
        return full

    def save(self, folder: Path) -> None:
        """Write a checkpoint in DeepSpeed's own format, which wants the same number of ranks again.

        Of a student with adapters, without the frozen weights.
        """
        digest = self._left_out.digest
        self.student.save_checkpoint(
            str(folder), tag=_TAG, client_state={_LEFT_OUT: digest}, exclude_frozen_parameters=bool(digest)
        )

    def load(self, folder: Path) -> None:
        """Read a checkpoint in DeepSpeed's own format.

        Raises:
            EngineError: there is none in `folder`, or its adapters were trained on other weights.
        """
        whole = not self._left_out.names
        loaded, state = self.student.load_checkpoint(str(folder), tag=_TAG, load_module_strict=whole)
        if loaded is None:
            raise EngineError(f"{folder} holds no DeepSpeed checkpoint: was it written by another train.parallel?")
        self._left_out.check(state.get(_LEFT_OUT, ""), folder)


def shard_teacher(teacher: nn.Module, student: Mapping[str, Any], *, precision: str, offload: bool = False) -> Any:
    """Put a frozen model into a ZeRO-3 engine of its own, without optimizer; returns the engine, to be called for it.

    Args:
        teacher: the model.
        student: the DeepSpeed configuration of the student, whose gathering it shares.
        precision: "float32", "bfloat16" or "float16", in which it computes.
        offload: keep its parameters in host memory.
    """
    block = zero_block.teacher_config(student, precision=precision, offload=offload)
    engine = _initialize(_import_deepspeed(), teacher.requires_grad_(False).eval(), config=block)
    engine.eval()
    return engine


@contextmanager
def deepspeed_settings() -> Iterator[None]:
    """Set what a process needs while it trains under DeepSpeed, and put it back afterwards.

    DeepSpeed wants LOCAL_RANK also without a launcher; the hundreds of lines that it logs below WARNING would hide
    ours; and that it calls collectives by names which torch 2.13 renamed is not the user's affair.
    """
    log, given = logging.getLogger("DeepSpeed"), os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = given or "0"
    _import_deepspeed()  # before the level is read: the import sets it
    level = log.level
    if not log.isEnabledFor(logging.DEBUG):
        log.setLevel(logging.WARNING)
    renamed = r".*torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
            yield
    finally:
        log.setLevel(level)
        if given is None:
            del os.environ["LOCAL_RANK"]


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "train.parallel deepspeed needs it: pip install --no-build-isolation 'kd-plugin[deepspeed]'"
        ) from error
    return deepspeed


def _forget_warm_up_step(optimizer: torch.optim.Optimizer) -> None:
    """Set back the count of DeepSpeed's step on zero gradients, after which Adam's bias correction starts late."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()


def _initialize(deepspeed: Any, model: nn.Module, **options: Any) -> Any:
    """Call deepspeed.initialize and put the buffers back as they were; returns DeepSpeed's engine."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with said_if_slow("DeepSpeed is compiling an extension, the first time on a machine: a minute or two"):
        engine, *_ = deepspeed.initialize(model=model, **options)
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    return engine
