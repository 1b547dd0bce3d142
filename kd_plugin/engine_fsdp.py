"""The FSDP2 adapter: sharded ranks, replicated ranks (DDP's layout), or one process.

Notable decisions:
- gradients are reduced after every micro-batch. Deferring it would save traffic, but keeps a whole fp32
  gradient on every rank until the step; replicas hold one anyway, so they defer their all-reduce;
- fused AdamW, because the unfused one issues thousands of tiny DTensor operations;
- fp16 uses torch's GradScaler: DTensor reduces its overflow flag over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kd_plugin.config import RunConfig
from kd_plugin.engine import DTYPES, Placement, parameter_groups
from kd_plugin.parallel import fsdp

__all__ = ["FsdpEngine"]


class FsdpEngine:
    """Student under FSDP2, teacher under FSDP2 or whole on each rank; see `kd_plugin.engine.Engine`."""

    student: FSDPModule

    def __init__(self, student: nn.Module, teacher: nn.Module, config: RunConfig, place: Placement, mode: str):
        train, fp16 = config.train, config.student.dtype == "float16"
        self.module, self.teacher, self.place = student, teacher, place
        self.applied_notes: list[str] = []
        self._replicate = mode == "ddp"
        self._max_grad_norm = train.max_grad_norm
        mesh = fsdp.make_mesh(place.device.type, place.world_size, replicate=self._replicate)
        fsdp.shard_student(student, mesh, dtype=DTYPES[config.student.dtype])
        self._place_teacher(config)
        self.student = student
        self.optimizer = torch.optim.AdamW(
            parameter_groups(student, train.weight_decay),
            lr=train.learning_rate,
            betas=train.adam_betas,
            eps=train.adam_eps,
            fused=True,
        )
        self._scaler = GradScaler(device=place.device.type, enabled=fp16)

    def _place_teacher(self, config: RunConfig) -> None:
        if config.teacher.sharding == "shard" and self.place.world_size > 1:
            shards = fsdp.make_mesh(self.place.device.type, self.place.world_size, replicate=False)
            fsdp.shard_teacher(self.teacher, shards)
        else:
            self.teacher.requires_grad_(False).eval().to(self.place.device)

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> None:
        """See `Engine`; times world_size, because FSDP averages the gradients over the ranks."""
        if self._replicate:
            self.student.set_requires_all_reduce(is_last)
        loss = self.student(**inputs, num_items_in_batch=num_items).loss
        self._scaler.scale(loss * self.place.world_size).backward()

    def step(self, learning_rate: float) -> Tensor:
        """See `Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> None:
        """See `Engine`."""
        self.student(**inputs, num_items_in_batch=num_items)

    def full_state_dict(self) -> dict[str, Tensor]:
        """See `Engine`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.module, options=options)

    def save(self, folder: Path) -> None:
        """See `Engine`; torch.distributed.checkpoint, readable at any number of ranks."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scaler": self._scaler.state_dict()}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scaler": self._scaler.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self._scaler.load_state_dict(state["scaler"])
