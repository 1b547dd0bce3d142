"""What a model's backbone does for one micro-batch, counted on the meta device: FLOP, bytes, and what autograd keeps.

Notable decisions:
- every operation that PyTorch runs in eager mode is one entry: products with their FLOP, all of them with the bytes
  that they read and write. Views and allocations move nothing; look-ups move what they return;
- fused attention is counted as what it computes (half of the scores if it is causal, all under a mask of its own, and
  for backward once more to recompute them), and as what it keeps: its inputs, its output and one number per row, and a
  mask, which each call makes additive in the dtype of the model;
- packed documents that are kept apart need such masks, so the ones of the model's own code are made here, too;
- what a compiled model or special kernels would do is unknown here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from kd_plugin.distributed.torch_internals import storage_id, watch_operations
from kd_plugin.engines.fsdp_units import decoder_layers
from kd_plugin.plugin.isolation import isolated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Activations", "Op", "Run", "Work", "run_without_values"]

_FREE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_LOOK_UPS = ("embedding", "embedding_dense_backward", "gather", "index_select")
_BACKWARD_OF_ATTENTION = 2.5  # of its forward's FLOP: five products instead of two


class Op(NamedTuple):
    """One operation as the roofline sees it."""

    kind: str
    """product, attention, or memory (everything else)."""
    flops: float
    num_bytes: float
    """Read and written."""


@dataclass(frozen=True)
class Work:
    """The operations of one micro-batch, each with how often it runs."""

    forward: Counter[Op]
    backward: Counter[Op]
    """Empty for a teacher."""


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps for the backward pass of one micro-batch."""

    layers: tuple[int, ...]
    """Bytes kept by each decoder layer."""
    outside: int
    """Bytes kept by the rest of the backbone."""
    boundary: int
    """Bytes of one hidden state `[B, S, D]`, which is what a checkpointed layer keeps."""
    masks: int = 0
    """Bytes of the attention masks `[B, 1, S, S]` that layers are given, each once."""


class Run(NamedTuple):
    """What one run of a backbone has shown."""

    activations: Activations
    work: Work


def run_without_values(
    model: PreTrainedModel, dtype: torch.dtype, batch: tuple[int, int], *, with_backward: bool, masked: bool = False
) -> Run:
    """Run the backbone of `model`, which is on the meta device in `dtype`, over `batch` = (sequences, length).

    If it is `masked`, by masks that keep packed documents apart.
    """
    kept, count = _Kept(model), _Count()
    spans: list[int] = []
    masks: dict[int, Tensor] = {}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        spans.append(-kept.num_bytes)
        masks.update((storage_id(mask), mask) for mask in _tensors([args, kwargs]) if _is_mask(mask, batch[1]))

    def leave(*_: object) -> None:
        spans[-1] += kept.num_bytes

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            handles = layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(_Valueless(count))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor))
        with watch_operations(count.see):
            hidden = _hidden_states(model.train().base_model, batch, masked=masked)
        forward = count.take()
        of_masks = sum(mask.untyped_storage().nbytes() for mask in masks.values())
        boundary = hidden.numel() * dtype.itemsize
        activations = Activations(tuple(spans), kept.num_bytes - sum(spans), boundary, of_masks)
        if with_backward and hidden.requires_grad:
            learnt = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
            with watch_operations(count.see):
                torch.autograd.grad(hidden, learnt, torch.empty_like(hidden), allow_unused=True)
    return Run(activations, Work(forward, count.take()))


def _hidden_states(backbone: nn.Module, batch: tuple[int, int], *, masked: bool) -> Tensor:
    ids, positions = (torch.zeros(batch, dtype=torch.int64, device="meta") for _ in range(2))
    inputs = {"input_ids": ids, **({"position_ids": positions} if masked else {})}
    with isolated(backbone.forward, "mask" if masked else None, inputs) as given:
        return backbone(**given, use_cache=False).last_hidden_state


def _is_mask(tensor: Tensor, length: int) -> bool:
    return tensor.ndim == 4 and tensor.shape[-2:] == (length, length)


class _Kept:
    """Adds up the storages that autograd saves, each once, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._seen = {storage_id(parameter) for parameter in model.parameters()}
        self._alive: list[Tensor] = []  # an address that is freed could be given to another storage

    def pack(self, tensor: Tensor) -> Tensor:
        storage = storage_id(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self._alive.append(tensor.detach())
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor


class _Count:
    """Adds up operations."""

    def __init__(self) -> None:
        self._ops: Counter[Op] = Counter()

    def take(self) -> Counter[Op]:
        """What has run since it was last asked."""
        ops, self._ops = self._ops, Counter()
        return ops

    def add(self, op: Op) -> None:
        self._ops[op] += 1

    def see(self, operation: Any, arguments: Any, out: Any) -> None:
        """Add one operation of PyTorch."""
        name = operation.__name__
        if name in _FREE:
            return
        moved = (out, out) if name in _LOOK_UPS else (arguments, out)
        num_bytes = sum(_extent(tensor) for tensor in _tensors(moved))
        flops = flop_registry.get(operation)
        if flops is None:
            self.add(Op("memory", 0, num_bytes))
        else:
            self.add(Op("product", flops(*arguments[0], **arguments[1], out_val=out), num_bytes))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _extent(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded tensor is read from its own storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class _Valueless(TorchFunctionMode):
    """Fused attention, where PyTorch on the meta device would keep all S x S scores; and no look at values.

    Models ask whether a mask holds no padding, or one document: answered with yes, which is the plain causal mask.
    """

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            named = dict(zip(names, args, strict=False)) | (kwargs or {})
            tensors = (named["query"], named["key"], named["value"], self._additive(named))
            return _Attention.apply(*tensors, bool(named.get("is_causal")), self._count.add)
        if func is Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))

    def _additive(self, named: dict[str, Any]) -> Tensor | None:
        """The mask that a kernel is given: PyTorch makes one of truth values additive in every call."""
        mask = named.get("attn_mask")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return mask
        made = named["query"].new_empty(mask.shape)
        self._count.add(Op("memory", 0, _extent(mask) + made.nbytes))
        return made


class _Attention(torch.autograd.Function):
    """Attention that keeps for backward what fused attention keeps, and counts itself."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        add: Callable[[Op], None],
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        read = (query, key, value) if mask is None else (query, key, value, mask)
        ctx.save_for_backward(*read, out, log_sums)
        ctx.add, rows, columns = add, query.shape[-2], key.shape[-2]
        scores = log_sums.numel() * columns * ((rows + 1) / (2 * rows) if causal else 1.0)
        ctx.op = Op(
            "attention",
            2 * scores * (query.shape[-1] + value.shape[-1]),
            sum(map(_extent, (*read, out))),
        )
        add(ctx.op)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        op = ctx.op
        ctx.add(Op(op.kind, _BACKWARD_OF_ATTENTION * op.flops, 2 * op.num_bytes))
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None, None, None)
