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

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ShardingError",
    "decoder_layers",
    "embedding_and_head",
    "make_mesh",
    "narrow_frozen",
    "shard_student",
    "shard_teacher",
]


class ShardingError(ValueError):
    """The model cannot be cut into units."""


def make_mesh(
    device_type: str, world_size: int, *, replicate: bool = False, shard_size: int | None = None
) -> DeviceMesh:
    """A mesh of all ranks as one group of shards, or as groups of `shard_size` ranks that replicate each other (HSDP).

    A group is of consecutive ranks, and gradients are averaged over the groups. `replicate` is short for groups of one
    rank: DDP's layout, as FSDP2, so that every mode computes in the same precision.

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


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that Transformers says must not be split; of one inside another (Mamba's mixers) the outer.

    Raises:
        ShardingError: the model names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[nn.Module] = []
    within: set[nn.Module] = set()
    for module in model.modules():  # the outer ones first
        if type(module).__name__ in names and module not in within:
            layers.append(module)
            within.update(module.modules())
    if not layers:
        raise ShardingError(
            f"{type(model).__name__} names no decoder layers (_no_split_modules = {sorted(names)}): "
            "FSDP needs them as its units, and train.compile to compile them; set model._no_split_modules to the class "
            "names of its blocks"
        )
    return layers


def embedding_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The input embedding and the LM head of a model that has both, as every causal LM that is trained here has."""
    head = model.get_output_embeddings()
    assert head is not None
    return model.get_input_embeddings(), head


class _Options(TypedDict, total=False):
    mesh: DeviceMesh
    mp_policy: MixedPrecisionPolicy
    offload_policy: CPUOffloadPolicy


def shard_student(model: PreTrainedModel, mesh: DeviceMesh, *, dtype: torch.dtype) -> None:
    """Shard a trainable model with fp32 parameters in place; it computes in `dtype` and reduces in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    _shard(model, {"mesh": mesh, "mp_policy": policy}, frozen=False)


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained in the `dtype` that FSDP2 gathers it in, in place: the same numbers, in less memory."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard_teacher(model: PreTrainedModel, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Shard a frozen model in place; it computes in the dtype that it has.

    With `offload` the shards stay in host memory (pinned, if there is a GPU), and each unit is copied to the
    device when it is gathered.
    """
    model.requires_grad_(False).eval()
    options: _Options = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    _shard(model, options, frozen=True)


def _shard(model: PreTrainedModel, options: _Options, *, frozen: bool) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True, **options)
    embedding, head = embedding_and_head(model)
    for unit in ([embedding, head],) if embedding.weight is head.weight else ([embedding], [head]):
        fully_shard(unit, reshard_after_forward=True, **options)
        if not frozen and (embedding not in unit or isinstance(embedding, nn.Embedding)):  # else a peft adapter on it
            first = unit[0]
            assert isinstance(first, FSDPModule)
            first.set_unshard_in_backward(False)
    # A trainable root keeps its few parameters from forward to backward (None is FSDP2's rule for roots).
    fully_shard(model, reshard_after_forward=True if frozen else None, **options)
