"""How a wrapper has cut a weight over the ranks: which part of it is here.

How FSDP2, FSDP1 and ZeRO-3 hold weights is known here alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from kd_plugin.distributed.collectives import all_reduce


@dataclass(frozen=True)
class RowShards:
    """How FSDP2 or HSDP cuts a weight: into blocks of rows over `group`, in its order."""

    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    """The ranks that hold the same rows in other groups; None without HSDP."""
    ranks: int
    """Of all groups: FSDP averages gradients over them."""


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
    head: nn.Linear, bounds: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """Rows `[bounds[r], bounds[r + 1])` of a frozen head's weight `[V, D]` and bias, as FSDP2 holds them on rank r.

    None, on all ranks of `group` alike, unless the head is a unit of its own, cut over the same ranks such that every
    rank has its rows, on `device`, and in the precision in which they are multiplied.
    """
    if not isinstance(head, FSDPModule):
        return None
    cut, whole, bias = row_shards(head.weight), head.weight, head.bias
    if (
        cut is None
        or not isinstance(whole, DTensor)
        or dist.get_process_group_ranks(cut.group) != dist.get_process_group_ranks(group)
    ):
        return None
    weight, each = whole.to_local(), -(-head.out_features // dist.get_world_size(group))
    wanted = list(pairwise(bounds))
    if any(start < stop and not r * each <= start <= stop <= (r + 1) * each for r, (start, stop) in enumerate(wanted)):
        return None
    computes_in = head._get_fsdp_state()._mp_policy.param_dtype or weight.dtype  # nothing public says it
    if weight.device != device or weight.dtype != computes_in:
        return None
    rank = dist.get_rank(group)
    start, stop = wanted[rank]
    here = slice(start - rank * each, stop - rank * each) if start < stop else slice(0, 0)
    assert bias is None or isinstance(bias, DTensor)
    return weight[here], None if bias is None else bias.to_local()[here]


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


def is_gathered(model: object) -> bool:
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


def rows_here(parameter: Tensor, replicas: dist.ProcessGroup | None) -> Tensor:
    """This rank's rows of an FSDP2 parameter; their gradient is summed over `replicas`, and not reduced besides."""
    if not isinstance(parameter, DTensor):
        return parameter
    rows = parameter.to_local(grad_placements=parameter.placements)
    if replicas is not None and rows.requires_grad:
        rows.register_hook(partial(_sum_over, replicas))
    return rows


def _sum_over(replicas: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    all_reduce(total, replicas, "the gradient of the head's rows")
    return total
