"""The FSDP2 adapter: sharded ranks, groups of sharded ranks (HSDP), replicated ranks (DDP's layout), one process.

Notable decisions:
- gradients are reduced after every micro-batch. Deferring it would save traffic, but keeps a whole fp32
  gradient on every rank until the step; what replicas hold is reduced within their group already, so they
  defer their all-reduce (but for the head's under `exchange: stats`, which FSDP does not reduce);
- fused AdamW, because the unfused one issues thousands of tiny DTensor operations;
- fp16 uses torch's GradScaler: DTensor reduces its overflow flag over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kd_plugin.engines import fsdp_units
from kd_plugin.engines.left_out import LeftOut
from kd_plugin.engines.optimizers import make_adamw, set_learning_rate
from kd_plugin.engines.process_group import Placement
from kd_plugin.engines.protocol import DTYPES, parameter_groups
from kd_plugin.settings.run import RunConfig, TeacherConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FsdpEngine"]


class FsdpEngine:
    """An `Engine` with the student under FSDP2, and the teacher under FSDP2 or whole on each rank."""

    student: nn.Module
    """FSDP2: `module` itself, now an FSDPModule; FSDP1: the wrapper around it."""

    teacher: nn.Module
    torch_optimizer: torch.optim.Optimizer | None

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, config: RunConfig, place: Placement, mode: str
    ) -> None:
        train = config.train
        self.module: nn.Module = student
        self.place = place
        self.applied_notes: list[str] = []
        self._left_out = LeftOut(student, config)
        self._max_grad_norm = train.max_grad_norm
        self._shard_size = place.world_size if train.shard_size is None or mode == "single" else train.shard_size
        mesh = self._mesh(1 if mode == "ddp" else self._shard_size)
        self._has_replicas = mesh.ndim == 2
        if 1 < mesh.shape[-1] < place.world_size:
            copies = place.world_size // self._shard_size
            self.applied_notes.append(f"train.shard_size {self._shard_size}: {copies} copies of the student")
        self.student, groups = self._shard_student(student, mesh, DTYPES[config.student.dtype], train.weight_decay)
        self.teacher = self._place_teacher(teacher, config.teacher)
        fp16 = config.student.dtype == "float16"
        self._scaler = self._make_scaler(place.device.type, enabled=fp16)
        fused = self._fused(train.optimizer, fp16)
        self.optimizer = self.torch_optimizer = make_adamw(groups, train, place.device, fused=fused)

    def _shard_student(
        self, student: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype, weight_decay: float
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Shard the student; returns the module to call, and the optimizer's parameter groups."""
        if self._left_out.names:  # a base below adapters, which is most of the student
            fsdp_units.narrow_frozen(student, dtype)
        fsdp_units.shard_student(student, mesh, dtype=dtype)
        return student, parameter_groups(student, weight_decay)

    def _shard_teacher(self, teacher: PreTrainedModel, mesh: DeviceMesh, *, offload: bool) -> nn.Module:
        """Shard the frozen teacher; returns the module to call."""
        fsdp_units.shard_teacher(teacher, mesh, offload=offload)
        return teacher

    def _fused(self, optimizer: str, fp16: bool) -> bool:
        return optimizer != "adamw"

    def _make_scaler(self, device_type: str, *, enabled: bool) -> GradScaler:
        return GradScaler(device=device_type, enabled=enabled)

    def _mesh(self, shard_size: int) -> DeviceMesh:
        world_size = self.place.world_size
        replicate = shard_size == 1 and world_size > 1
        return fsdp_units.make_mesh(self.place.device.type, world_size, replicate=replicate, shard_size=shard_size)

    def _place_teacher(self, teacher: PreTrainedModel, config: TeacherConfig) -> nn.Module:
        """Put the teacher where `config` wants it, whole or sharded; returns the module to call."""
        placed: nn.Module = teacher
        shard_size = self._shard_size if config.sharding == "shard" else 1
        if shard_size > 1 or config.offload:
            placed = self._shard_teacher(teacher, self._mesh(shard_size), offload=config.offload)
        else:
            teacher.requires_grad_(False).eval()
            teacher.to(self.place.device)  # pyright: ignore[reportArgumentType]  (its decorator loses `self`)
        if config.offload and self.place.device.type == "cpu":
            self.applied_notes.append("teacher.offload has no effect: there is no GPU, host memory holds everything")
        return placed

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> Tensor:
        """Run one micro-batch; its gradients are scaled by world_size, because FSDP averages them over the ranks."""
        if self._has_replicas:
            self._reduce_over_copies(is_last)
        loss = self.student(**inputs, num_items_in_batch=num_items).loss
        self._scaler.scale(loss * self.place.world_size).backward()
        return loss.detach()

    def _reduce_over_copies(self, now: bool) -> None:
        assert isinstance(self.student, FSDPModule)
        self.student.set_requires_all_reduce(now)

    def step(self, learning_rate: float) -> Tensor:
        """Clip the gradients and take one AdamW step, which fp16's loss scaling may leave out."""
        set_learning_rate(self.optimizer, learning_rate)
        self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> Tensor:
        """Run one held-out micro-batch through the sharded student, without gradients."""
        return self.student(**inputs, num_items_in_batch=num_items).loss

    def full_state_dict(self) -> dict[str, Tensor]:
        """Gather the student's shards on rank 0's CPU with torch's distributed state dict."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast("dict[str, Tensor]", get_model_state_dict(self.student, options=options))

    def save(self, folder: Path) -> None:
        """Write model, optimizer and loss scale with torch.distributed.checkpoint, readable at any number of ranks.

        Of a student with adapters, without the frozen weights.
        """
        model, optimizer = get_state_dict(self.student, self.optimizer)
        save(self._saved(model, optimizer), checkpoint_id=folder)

    def _saved(self, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint consists of."""
        state = {"model": self._left_out.without(model), "optimizer": optimizer, "scaler": self._scaler.state_dict()}
        return state | {"left_out": self._left_out.digest} if self._left_out.names else state

    def load(self, folder: Path) -> None:
        """Read a checkpoint of torch.distributed.checkpoint, written by any number of ranks.

        Raises:
            EngineError: its adapters were trained on other weights.
        """
        model, optimizer = get_state_dict(self.student, self.optimizer)
        state = self._saved(model, optimizer)
        load(state, checkpoint_id=folder)
        self._left_out.check(state.get("left_out", ""), folder)
        set_state_dict(
            self.student,
            self.optimizer,
            model_state_dict={**model, **state["model"]},
            optim_state_dict=state["optimizer"],
        )
        self._scaler.load_state_dict(state["scaler"])
