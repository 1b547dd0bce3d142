"""How a model keeps the documents of a packed sequence apart, given positions that start anew in each.

Notable decisions:
- nothing is assumed of a model: these are ways to try, and whoever packs looks at hidden states
  (`training.isolation`). Positions alone are enough where Transformers makes the masks from them, which is up to each
  model's file;
- where it does not, the functions that make the masks are told of the documents while the forward runs. Windows, the
  dtype and the form (boolean, additive, a flex block mask) stay what the model and its backend make them;
- flash attention has no mask, so it is given the documents' bounds: by positions alone it separates documents in
  batches of one sequence only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin.plugin.logit_probe import configurations

__all__ = ["Way", "attention_of", "isolated", "recurrent_layers", "ways_of", "windows_of"]

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window", "local_window_size")

Way = Literal["position_ids", "mask", "varlen"]
"""`position_ids`: the model's own masks from positions; `mask`: documents in every mask; `varlen`: bounds for flash."""


def attention_of(model: nn.Module) -> str:
    """The attention backend of a Transformers model; "" where it has none."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or ""


def windows_of(model: nn.Module) -> dict[str, Any]:
    """The settings by which some layers of `model` attend to a window only, with their values; empty without one."""
    given = ((name, getattr(config, name, None)) for config in configurations(model) for name in _WINDOWS)
    return {name: value for name, value in given if value}


def ways_of(model: nn.Module) -> tuple[Way, ...]:
    """What may keep documents apart in `model` with its attention backend, in the order in which to try it."""
    return ("varlen", "position_ids") if "flash" in attention_of(model) else ("position_ids", "mask")


@contextmanager
def isolated(forward: Callable[..., Any], way: Way | None, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs for `forward`, called in the body, with which documents are kept apart in the given way.

    Args:
        forward: of the model.
        way: None leaves everything as it is, and so do inputs without `position_ids`.
        inputs: keyword arguments of the forward, `position_ids` `[B, S]` among them, 0 where a document begins.
    """
    positions = inputs.get("position_ids")
    if way is None or not isinstance(positions, Tensor):
        yield inputs
        return
    if "position_ids" not in inspect.signature(forward).parameters:  # BLOOM, MPT: distances, or no positions at all
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    if way == "varlen":
        yield {**inputs, **_bounds(positions)}
    elif way == "mask":
        with _documents_in_masks((positions == 0).cumsum(-1)):
            yield inputs
    else:
        yield inputs


def _bounds(positions: Tensor) -> dict[str, Any]:
    """Flash attention's arguments about where each document begins, in the sequences laid end to end."""
    starts = (positions == 0).flatten().nonzero().flatten().int()
    bounds = F.pad(starts, (0, 1), value=positions.numel())
    longest = positions.shape[-1]  # a bound is enough, and asks the device for nothing
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@contextmanager
def _documents_in_masks(documents: Tensor) -> Iterator[None]:
    """Have every attention mask that Transformers makes in the body hold to `documents`, numbers `[B, S]`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    before = dict(ALL_MASK_ATTENTION_FUNCTIONS.items())
    try:
        for name, make in before.items():
            AttentionMaskInterface.register(name, _within(documents, make))
        yield
    finally:
        for name, make in before.items():
            AttentionMaskInterface.register(name, make)


def _within(documents: Tensor, make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, which makes a backend's mask from `mask_function`, for attention within documents."""
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    length = documents.shape[-1]

    def make_within(*, mask_function: Callable[..., Any] = causal_mask_function, **settings: Any) -> Any:
        if not settings["q_length"] == settings["kv_length"] == length:  # another's: an encoder's, a cross-attention's
            return make(mask_function=mask_function, **settings)
        ids = documents.to(settings.get("device") or documents.device)
        both = and_masks(packed_sequence_mask_function(ids), mask_function)
        return make(mask_function=both, **{**settings, "allow_is_causal_skip": False})

    return make_within


def recurrent_layers(model: nn.Module) -> list[str]:
    """Classes of layers that carry a state from token to token, as far as their parts tell."""
    names = {
        type(module).__name__
        for module in model.modules()
        if hasattr(module, "A_log") or any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    }
    return sorted(names)
