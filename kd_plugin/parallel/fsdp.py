"""FSDP2 units of a Hugging Face causal LM.

Notable decisions:
- every decoder layer is a unit, the root comes last and keeps what is left (norms, position embeddings);
- an untied head is alone in its unit. The loss returns the head's gradient without reading the weight in
  backward, so a trainable head is not gathered again there (`set_unshard_in_backward(False)`); the same
  holds for an untied input embedding, whose backward reads indices only;
- tied weights share one unit, because FSDP2 refuses one parameter in two units;
- a frozen model says `reshard_after_forward=True` at its root too: without a backward pass nothing else
  would ever free the gathered root parameters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

__all__ = ["ShardingError", "decoder_layers", "make_mesh", "shard_student", "shard_teacher"]


class ShardingError(ValueError):
    """The model cannot be cut into units."""


def make_mesh(device_type: str, world_size: int, *, replicate: bool) -> DeviceMesh:
    """All ranks as shards, or (`replicate`) as whole copies whose gradients are averaged: DDP's layout.

    The second is FSDP2 with shards of one rank, so that both modes compute in the same precision.
    """
    if replicate:
        return init_device_mesh(device_type, (world_size, 1), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that Transformers says must not be split. Raises ShardingError when there are none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ShardingError(
            f"{type(model).__name__} names no decoder layers (_no_split_modules = {sorted(names)}): "
            "FSDP needs them as its units; set model._no_split_modules to the class names of its blocks"
        )
    return layers


def shard_student(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype) -> None:
    """Shard a trainable model with fp32 parameters in place; it computes in `dtype` and reduces in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    _shard(model, mesh, policy, frozen=False)


def shard_teacher(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a frozen model in place; it computes in the dtype that it has."""
    model.requires_grad_(False).eval()
    _shard(model, mesh, MixedPrecisionPolicy(), frozen=True)


def _shard(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, frozen: bool) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        fully_shard([embedding, head], mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    else:
        for module in (embedding, head):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            if not frozen:
                module.set_unshard_in_backward(False)
    # A trainable root keeps its few parameters from forward to backward (None is FSDP2's rule for roots).
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True if frozen else None)
