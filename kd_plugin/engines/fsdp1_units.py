"""FSDP1 units of a Hugging Face causal LM, for those who cannot move to FSDP2 yet.

Notable decisions:
- every decoder layer is a unit, and an untied head and its embedding are each one; a tied pair stays in the root,
  because one FSDP1 unit is one module, and the loss needs both to be whole together;
- around a frozen model lies an empty unit: FSDP1 leaves its root whole after a forward pass, for a backward pass
  that a teacher never has;
- original parameters are kept (`use_orig_params`), so that frozen and trained ones share a unit and an optimizer
  finds its groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy

from kd_plugin.engines.fsdp_units import decoder_layers, embedding_and_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["wrap_student", "wrap_teacher"]


def wrap_student(
    model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, *, dtype: torch.dtype
) -> FullyShardedDataParallel:
    """Wrap a trainable model with fp32 parameters; it computes in `dtype` and reduces in fp32.

    `mesh` comes from `fsdp_units.make_mesh`: one axis, or two for HSDP. The parameters stay the same objects.
    """
    narrow = None if dtype == torch.float32 else MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)
    return _wrap(model, mesh, device, mixed_precision=narrow)


def wrap_teacher(
    model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, *, offload: bool = False
) -> FullyShardedDataParallel:
    """Wrap a frozen model, which computes in the dtype that it has; with `offload` its shards wait in host memory."""
    model.requires_grad_(False).eval()
    there = offload and device.type != "cpu"  # else it is in host memory already, which FSDP1 would pin
    inner = _wrap(model, mesh, device, cpu_offload=CPUOffload(offload_params=True) if there else None)
    return FullyShardedDataParallel(inner, **_group(mesh), device_id=device, use_orig_params=True)


def _wrap(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    mixed_precision: MixedPrecision | None = None,
    cpu_offload: CPUOffload | None = None,
) -> FullyShardedDataParallel:
    embedding, head = embedding_and_head(model)
    units = set(decoder_layers(model)) | (set() if embedding.weight is head.weight else {embedding, head})
    return FullyShardedDataParallel(
        model,
        **_group(mesh),
        auto_wrap_policy=CustomPolicy(units.__contains__),
        device_id=device,
        use_orig_params=True,
        mixed_precision=mixed_precision,
        cpu_offload=cpu_offload,
    )


class _Group(TypedDict):
    device_mesh: DeviceMesh
    sharding_strategy: ShardingStrategy


def _group(mesh: DeviceMesh) -> _Group:
    strategy = ShardingStrategy.FULL_SHARD if mesh.ndim == 1 else ShardingStrategy.HYBRID_SHARD
    return {"device_mesh": mesh, "sharding_strategy": strategy}
