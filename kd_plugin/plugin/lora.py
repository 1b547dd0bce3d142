"""A LoRA adapter of peft on the student's head: what it adds to the logits, as one term of low rank.

Notable decisions:
- each of the adapter's layers is called as a module, one inside the other's forward, the base layer innermost:
  there every wrapper (DDP, FSDP1, FSDP2, ZeRO-3) has its weight whole;
- which adapters count is peft's state at the moment of the call, so switching and merging go on working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin.distributed.layout import gathered, slice_here, vocab_cut
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.plugin.causal_lm import unwrap
from kd_plugin.plugin.replaced_forward import ReplacedForward, is_replaced

__all__ = ["active_adapters", "on_slice", "take_over_adapter"]


def active_adapters(head: Any) -> list[str]:
    """Names of the adapters that `head`, a peft `lora.Linear`, would add now; as its own forward finds them."""
    if head.disable_adapters:
        if head.merged:
            head.unmerge()
        return []
    names = [] if head.merged else [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if name in head.lora_variant:
            kind = type(head.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise ValueError(
                f"adapter {name!r} on the student's head is of kind {kind}, which is more than a low-rank term of "
                "the logits; wanted plain LoRA: leave the head out of its target_modules, or merge it before attach()"
            )
    return names


def take_over_adapter(head: Any) -> list[Callable[[], None]]:
    """Let the layers of `head`, a LoRA layer of peft, hand out their terms; returns what undoes it, last to first."""
    adapter_layers = [*((_down, layer) for layer in head.lora_A.values()), *((_up, up) for up in head.lora_B.values())]
    replaced = [ReplacedForward(layer, make(layer)) for make, layer in adapter_layers]
    replaced.append(ReplacedForward(head, _adapted(head)))
    return [forward.restore for forward in replaced]


def _adapted(head: Any) -> Callable[..., Tensor]:
    """The forward of `head`, a peft `lora.Linear` whose base layer is a `DistillHead`."""
    original = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args and isinstance(args[0], HeadCall)):
            return original(hidden, *args, **kwargs)
        call, names, terms = args[0], active_adapters(head), []

        def inside(index: int) -> Tensor:
            """The loss, once the adapters from `index` on have given their terms."""
            if index == len(names):
                call.low_rank = _side_by_side(terms)
                return head.base_layer(hidden, call)
            name = names[index]
            if not is_replaced(unwrap(head.lora_B[name])):
                raise ValueError(f"adapter {name!r} came after attach(): call plugin.detach(), and attach() again")

            def use(factor: Tensor, up: nn.Linear) -> Tensor:
                terms.append(_term(factor, up.weight, up.bias, head.scaling[name]))
                return inside(index + 1)

            return head.lora_B[name](head.lora_A[name](hidden, head.lora_dropout[name]), use)

        return inside(0)

    return forward


def _down(layer: nn.Linear) -> Callable[..., Tensor]:
    """The forward of `lora_A`; with a dropout, on a copy of its small weight.

    The loss does not read the head in backward, so FSDP2 may leave a unit of head and adapter sharded there.
    """
    original = layer.forward

    def forward(hidden: Tensor, dropout: nn.Module | None = None) -> Tensor:
        if dropout is None:
            return original(hidden)
        return F.linear(dropout(hidden.to(layer.weight.dtype)), layer.weight.clone())

    return forward


def _up(layer: nn.Linear) -> Callable[..., Tensor]:
    """The forward of `lora_B`; with `use`, `use(factor, layer)` while its weight is whole."""
    original = layer.forward

    def forward(factor: Tensor, use: Callable[[Tensor, nn.Linear], Tensor] | None = None) -> Tensor:
        return original(factor) if use is None else use(factor, layer)

    return forward


def _term(factor: Tensor, up: Tensor, bias: Tensor | None, scaling: float) -> LowRank:
    flat = factor.reshape(-1, factor.shape[-1])
    return LowRank(flat * scaling, up, None if bias is None else bias * scaling)


def on_slice(head: Any, hidden: Tensor, call: HeadCall) -> Tensor:
    """The loss on the vocabulary slice of the student's head and its adapters that FSDP2 left here.

    What is small, lora_A, is gathered here: the modules' own forwards would gather the head with it.
    """
    cut, terms = vocab_cut(head.weight), []
    assert cut is not None
    for name in active_adapters(head):
        down, up = gathered(head.lora_A[name].weight), head.lora_B[name]
        factor = F.linear(head.lora_dropout[name](hidden.to(down.dtype)), down)
        bias = None if up.bias is None else slice_here(up.bias, cut.replicas)
        terms.append(_term(factor, slice_here(up.weight, cut.replicas), bias, head.scaling[name]))
    call.low_rank = _side_by_side(terms)
    return head.base_layer.on_slice(hidden, call)


def _side_by_side(terms: list[LowRank]) -> LowRank | None:
    """The sum of several low-rank terms, as one of greater rank."""
    if len(terms) < 2:
        return terms[0] if terms else None
    biases = [term.bias for term in terms if term.bias is not None]
    factors, ups = (torch.cat(parts, dim=1) for parts in list(zip(*terms, strict=True))[:2])
    return LowRank(factors, ups, sum(biases[1:], start=biases[0]) if biases else None)
