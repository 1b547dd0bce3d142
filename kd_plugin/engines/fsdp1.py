"""The FSDP1 adapter: the FSDP2 one with FSDP1's units, loss scaler, clipping and state dict."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from kd_plugin.engines import fsdp1_units
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.engines.protocol import EngineError, parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Fsdp1Engine"]


class Fsdp1Engine(FsdpEngine):
    """An `Engine` with the student in FSDP1, and the teacher in FSDP1 or whole on each rank."""

    def _shard_student(
        self, student: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype, weight_decay: float
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        groups = parameter_groups(student, weight_decay)  # before they are flat
        return fsdp1_units.wrap_student(student, mesh, self.place.device, dtype=dtype), groups

    def _shard_teacher(self, teacher: PreTrainedModel, mesh: DeviceMesh, *, offload: bool) -> nn.Module:
        return fsdp1_units.wrap_teacher(teacher, mesh, self.place.device, offload=offload)

    def _make_scaler(self, device_type: str, *, enabled: bool) -> GradScaler:
        return ShardedGradScaler(device=device_type, enabled=enabled)

    def _fused(self, optimizer: str, fp16: bool) -> bool:
        if fp16 and optimizer == "adamw_fused":
            raise EngineError("train.optimizer adamw_fused cannot read FSDP1's fp16 loss scale: set it to adamw")
        return (
            optimizer != "adamw" and not fp16
        )  # the flag of ShardedGradScaler has a shape that fused AdamW cannot read

    def _reduce_over_copies(self, now: bool) -> None:
        """Do nothing: FSDP1 reduces in every micro-batch, and putting it off (`no_sync`) would keep whole gradients."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Gather the student on rank 0's CPU; on a CPU, `cpu_offload` would hand out views of freed memory."""
        on_cpu = self.place.device.type == "cpu"
        options = StateDictOptions(full_state_dict=True, cpu_offload=not on_cpu)
        state = cast("dict[str, Tensor]", get_model_state_dict(self.student, options=options))
        return {} if on_cpu and self.place.rank else state

    def _clip(self) -> Tensor:
        limit = float("inf") if self._max_grad_norm is None else self._max_grad_norm
        assert isinstance(self.student, FullyShardedDataParallel)
        with warnings.catch_warnings():
            # All adapters of small layers may lie on one rank
            warnings.filterwarnings("ignore", message="Called FSDP.clip_grad_norm_.. on rank .* with no gradients")
            return self.student.clip_grad_norm_(limit)
