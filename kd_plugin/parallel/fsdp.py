"""FSDP2 units of a Hugging Face causal LM.

Notable decisions:
- every decoder layer is a unit, the root comes last and keeps what is left (norms, position embeddings);
- an untied head is alone in its unit; tied weights share one, because FSDP2 refuses one parameter in two units;
- the loss returns the head's gradient without reading the weight in backward, and an input embedding's backward
  reads indices only, so neither is gathered again there (`set_unshard_in_backward(False)`). An adapter on the
  embedding reads its weights, and is;
- a frozen model says `reshard_after_forward=True` at its root too: without a backward pass nothing else
  would ever free the gathered root parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = [
    "RowShards",
    "ShardingError",
    "decoder_layers",
    "is_gathered",
    "make_mesh",
    "row_shards",
    "shard_student",
    "shard_teacher",
    "sharded_over",
    "waits_for_engine",
    "whole_shape",
]


class ShardingError(ValueError):
    """The model cannot be cut into units."""


@dataclass(frozen=True)
class RowShards:
    """How FSDP2 or HSDP cuts a weight: into blocks of rows over `group`, in its order."""

    group: Any
    replicas: Any
    """The ranks that hold the same rows in other groups; None without HSDP."""
    ranks: int
    """Of all groups: FSDP averages gradients over them."""


def make_mesh(
    device_type: str, world_size: int, *, replicate: bool = False, shard_size: int | None = None
) -> DeviceMesh:
    """All ranks as one group of shards, or groups of `shard_size` consecutive ranks that replicate each other (HSDP).

    Gradients are averaged over the groups. `replicate` is short for groups of one rank: DDP's layout, as FSDP2, so
    that every mode computes in the same precision.

    Raises:
        ShardingError: `shard_size` does not divide `world_size`.
    """
    size = 1 if replicate else world_size if shard_size is None else shard_size
    if size < 1 or world_size % size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ShardingError(f"shard_size is {size}, wanted a divisor of {world_size} ranks: choose one of {divisors}")
    if size == world_size and not replicate:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def row_shards(weight: Tensor) -> RowShards | None:
    """The cut of `weight` into rows over several ranks; None where it is whole, or cut in another way."""
    if not isinstance(weight, DTensor):
        return None
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.shape[-1] == 1 or placements not in ((Shard(0),), (Replicate(), Shard(0))):
        return None
    replicas = mesh.get_group(0) if len(placements) == 2 else None
    return RowShards(mesh.get_group(len(placements) - 1), replicas, mesh.size())


def held_rows(
    head: nn.Linear, bounds: Sequence[int], group: Any, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """Rows `[bounds[r], bounds[r + 1])` of a frozen head's weight `[V, D]` and bias, as FSDP2 holds them on rank r.

    None, on all ranks of `group` alike, unless the head is a unit of its own, cut over the same ranks such that every
    rank has its rows, on `device`, and in the precision in which they are multiplied.
    """
    cut = row_shards(head.weight) if isinstance(head, FSDPModule) else None
    if cut is None or dist.get_process_group_ranks(cut.group) != dist.get_process_group_ranks(group):
        return None
    weight, each = head.weight.to_local(), -(-head.out_features // dist.get_world_size(group))
    wanted = list(pairwise(bounds))
    if any(start < stop and not r * each <= start <= stop <= (r + 1) * each for r, (start, stop) in enumerate(wanted)):
        return None
    computes_in = head._get_fsdp_state()._mp_policy.param_dtype or weight.dtype  # nothing public says it
    if weight.device != device or weight.dtype != computes_in:
        return None
    rank = dist.get_rank(group)
    start, stop = wanted[rank]
    here = slice(start - rank * each, stop - rank * each) if start < stop else slice(0, 0)
    return weight[here], None if head.bias is None else head.bias.to_local()[here]


def whole_shape(weight: Tensor, head: nn.Linear) -> tuple[int, int]:
    """`(V, D)` of a head's weight, however little of it is here."""
    shape = tuple(getattr(weight, "ds_shape", weight.shape))  # of ZeRO-3
    return shape if len(shape) == 2 else (head.out_features, head.in_features)  # of FSDP1, flat


def waits_for_engine(model: nn.Module) -> bool:
    """Whether zero.Init has partitioned weights of `model` and no DeepSpeed engine is there to gather them."""
    partitioned = any(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
    return partitioned and not hasattr(model, "ds_id")  # the engine numbers the modules, too


def sharded_over(weight: Tensor, numel: int) -> int | None:
    """Ranks over which a weight of `numel` elements is cut, 1 where it is whole; None if its wrapper does not say."""
    if isinstance(weight, DTensor):
        sizes = [weight.device_mesh.size(i) for i, cut in enumerate(weight.placements) if isinstance(cut, Shard)]
        return math.prod(sizes)
    here = weight.numel() == numel and weight.untyped_storage().size() > 0  # FSDP1 may leave a view of what it freed
    return 1 if here and not hasattr(weight, "ds_id") else None


def is_gathered(model: Any) -> bool:
    """Whether FSDP or ZeRO-3 gathers parts of `model` in its forward, which all ranks then have to call.

    It is the same on all ranks: nothing is asked of the parts that are here.
    """
    if not isinstance(model, nn.Module):
        return False
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(
        hasattr(parameter, "ds_id") or (isinstance(parameter, DTensor) and sharded_over(parameter, 0) != 1)
        for parameter in model.parameters()
    )


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
    _shard(model, {"mesh": mesh, "mp_policy": policy}, frozen=False)


def shard_teacher(model: nn.Module, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Shard a frozen model in place; it computes in the dtype that it has.

    With `offload` the shards stay in host memory (pinned, if there is a GPU), and each unit is copied to the
    device when it is gathered.
    """
    model.requires_grad_(False).eval()
    options: dict[str, Any] = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    _shard(model, options, frozen=True)


def _shard(model: nn.Module, options: dict[str, Any], *, frozen: bool) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for unit in ([embedding, head],) if embedding.weight is head.weight else ([embedding], [head]):
        fully_shard(unit, reshard_after_forward=True, **options)
        if not frozen and (embedding not in unit or isinstance(embedding, nn.Embedding)):  # else a peft adapter on it
            unit[0].set_unshard_in_backward(False)
    # A trainable root keeps its few parameters from forward to backward (None is FSDP2's rule for roots).
    fully_shard(model, reshard_after_forward=True if frozen else None, **options)
