"""How a wrapper has cut a weight over the ranks: which part of it is here.

How FSDP2, FSDP1 and ZeRO-3 hold weights is known here, and in `engines/`, which has them do so; nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kd_plugin.distributed.collectives import all_reduce
from kd_plugin.distributed.torch_internals import cut_of_gradient, fsdp2_compute_dtype


@dataclass(frozen=True)
class VocabCut:
    """How FSDP2 or HSDP cuts a head's weight: into vocabulary slices over `group`, in its order."""

    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    """The ranks that hold the same slice in other groups; None without HSDP."""
    ranks: int
    """How many ranks all groups have together: FSDP averages gradients over them."""

    @property
    def averaged(self) -> float:
        """The factor that makes a sum over all ranks what FSDP makes of every other gradient: their average."""
        return 1 / self.ranks


def chunk_length(size: int, ranks: int) -> int:
    """What the first ranks hold of `size` as FSDP2 cuts it (`torch.chunk`); the last ranks may hold less, or none."""
    return -(-size // ranks)


def vocab_cut(weight: Tensor) -> VocabCut | None:
    """The cut of a head's `weight` into vocabulary slices; None where it is whole, or cut in another way."""
    if not isinstance(weight, DTensor):
        return None
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.shape[-1] == 1 or placements not in ((Shard(0),), (Replicate(), Shard(0))):
        return None
    replicas = mesh.get_group(0) if len(placements) == 2 else None
    return VocabCut(mesh.get_group(len(placements) - 1), replicas, mesh.size())


def held_slice(
    head: nn.Linear, bounds: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """Token ids `[bounds[r], bounds[r + 1])` of a frozen head's weight `[V, D]` and bias as FSDP2 holds them on rank r.

    The head must be an FSDP2 unit of its own, cut over the ranks of `group` such that each holds all of its token ids,
    on `device`, and in the dtype in which they are multiplied. Otherwise the answer is None, on all ranks alike.
    """
    if not isinstance(head, FSDPModule):
        return None
    cut, whole, bias = vocab_cut(head.weight), head.weight, head.bias
    if (
        cut is None
        or not isinstance(whole, DTensor)
        or dist.get_process_group_ranks(cut.group) != dist.get_process_group_ranks(group)
    ):
        return None
    weight, each = whole.to_local(), chunk_length(head.out_features, dist.get_world_size(group))
    wanted = list(pairwise(bounds))
    if any(start < stop and not r * each <= start <= stop <= (r + 1) * each for r, (start, stop) in enumerate(wanted)):
        return None
    computes_in = fsdp2_compute_dtype(head) or weight.dtype
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
    partitioned = any(is_zero3(p) and p.numel() == 0 for p in model.parameters())
    return partitioned and not is_in_engine(model)


def sharded_over(weight: Tensor, numel: int) -> int | None:
    """Ranks over which a weight of `numel` elements is cut, 1 where it is whole; None if its wrapper does not say."""
    if isinstance(weight, DTensor):
        sizes = [weight.device_mesh.size(i) for i, cut in enumerate(weight.placements) if isinstance(cut, Shard)]
        return math.prod(sizes)
    here = weight.numel() == numel and weight.untyped_storage().size() > 0  # FSDP1 may leave a view of what it freed
    return 1 if here and not is_zero3(weight) else None


def is_gathered(model: object) -> bool:
    """Whether FSDP or ZeRO-3 gathers parts of `model` in its forward, which all ranks then have to call.

    It is the same on all ranks: nothing is asked of the parts that are here.
    """
    if not isinstance(model, nn.Module):
        return False
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(
        is_zero3(parameter) or (isinstance(parameter, DTensor) and sharded_over(parameter, 0) != 1)
        for parameter in model.parameters()
    )


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether `tensor` is cut, or replicated, by FSDP2 or tensor-parallelism."""
    return isinstance(tensor, DTensor)


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether `module` gathers its parameters in its own forward, as FSDP2 or FSDP1 have it."""
    return isinstance(module, (FSDPModule, FullyShardedDataParallel))


def has_fsdp2_unit(model: nn.Module) -> bool:
    """Whether FSDP2 makes parts of `model` whole for their forwards."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor of a DTensor on this rank; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placements_of(tensor: DTensor) -> str:
    """How a DTensor is cut, as its own texts say it, such as `Shard(dim=0)`."""
    return ", ".join(map(str, tensor.placements))


def loses_reduction(tensor: Tensor) -> bool:
    """Whether autograd will cut up, without a reduction, what each rank computes for this copy of a DTensor."""
    taken = cut_of_gradient(tensor)
    if taken is None:
        return False
    spec, asked_for = taken
    if asked_for is not None or spec.mesh.size() == 1:
        return False
    return all(placement.is_replicate() for placement in spec.placements)


def gathered(parameter: Tensor) -> Tensor:
    """An FSDP2 parameter, whole; its gradient is averaged over the ranks, as FSDP2 would. Any other as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def slice_here(parameter: Tensor, replicas: dist.ProcessGroup | None) -> Tensor:
    """This rank's slice of an FSDP2 parameter; its gradient is summed over `replicas`, and not reduced besides."""
    if not isinstance(parameter, DTensor):
        return parameter
    here = parameter.to_local(grad_placements=parameter.placements)
    if replicas is not None and here.requires_grad:
        here.register_hook(partial(_sum_over, replicas))
    return here


def _sum_over(replicas: dist.ProcessGroup, gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    all_reduce(total, replicas, "the gradient of the head's vocabulary slice")
    return total


def is_zero3(tensor: Tensor) -> bool:
    """Whether ZeRO-3 looks after this parameter, whole or partitioned at the moment."""
    return hasattr(tensor, "ds_id")


def is_in_engine(module: nn.Module) -> bool:
    """Whether a DeepSpeed engine of ZeRO-3 looks after this module; it numbers them."""
    return hasattr(module, "ds_id")


class _Part(Protocol):
    ds_numel: int

    def detach(self) -> Tensor: ...


class _Partitioned(Protocol):
    """A parameter of ZeRO-3, as far as it is read here."""

    ds_tensor: _Part
    ds_numel: int

    def get_partition_rank(self) -> int: ...


def values_here(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, without padding, and without its gradient."""
    detached = parameter.detach()
    if isinstance(detached, DTensor):
        return detached.to_local()
    if not hasattr(parameter, "ds_tensor") or parameter.numel():
        return detached
    # ZeRO-3's, of which the last rank's ends in memory of any content
    whole = cast("_Partitioned", parameter)
    start = whole.get_partition_rank() * whole.ds_tensor.ds_numel
    return whole.ds_tensor.detach().flatten()[: max(0, whole.ds_numel - start)]
