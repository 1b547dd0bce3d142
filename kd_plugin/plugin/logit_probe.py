"""What a model does to its logits after its head, read off known logits that it was given as its head's.

Notable decisions:
- it is measured, not looked up: attributes such as `logits_scaling` multiply in one architecture and divide in the
  next, and each release brings new names;
- a few known rows are enough, so the measurement fits into any forward of the model. It is made where the weights
  are: at `attach`, or in the first forward of a model whose weights come later (meta device, zero.Init, FSDP);
- a scale, a tanh soft-cap and an added bias are followed exactly, everything else is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.loss.teacher import AfterHead
from kd_plugin.row_kernels.row_pass import LogitTransform

NUM_ROWS = 4
_LIMIT = 60.0  # the ramp reaches from -60 to 60, beyond any soft-cap in use
_SATURATING = 1e8
_SMALL = 1e-3
_TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


class LogitsChanged(ValueError):
    """A model changes its logits after the head in a way that the loss cannot follow."""


def known_rows(vocab_size: int) -> Tensor:
    """The logits `[NUM_ROWS, V]` that a model is given: zeros, a ramp, saturating ones, small ones."""
    rows = torch.zeros(NUM_ROWS, vocab_size, dtype=torch.float32, device="cpu")
    rows[1] = torch.linspace(-_LIMIT, _LIMIT, vocab_size, dtype=torch.float32, device="cpu")
    rows[2] = _SATURATING
    rows[3] = _SMALL
    return rows


def configurations(model: nn.Module) -> tuple[Any, Any]:
    """The configurations of the whole model and of its text part, often the same; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config, config.get_text_config() if hasattr(config, "get_text_config") else config


def after_head(logits: Tensor, model: nn.Module, side: str) -> AfterHead:
    """What a model does to logits, given those `[NUM_ROWS, V]` that it made of `known_rows(V)`.

    Args:
        logits: of any float dtype, on any device.
        model: for the values that its configuration declares, which are preferred to the same values measured.
        side: "student" or "teacher", for the message.

    Raises:
        LogitsChanged: by more than a scale, a tanh soft-cap or a bias, or by something trainable.
    """
    if logits.requires_grad:  # the known rows do not
        raise LogitsChanged(
            f"the {side} ({type(model).__name__}) changes its logits after the head by trainable parameters, whose "
            "gradient would be lost: freeze them, or use DistillHead directly"
        )
    tolerance = _TOLERANCES.get(logits.dtype, 1e-4)
    if logits.is_meta:
        raise LogitsChanged(f"the {side} ({type(model).__name__}) is on the meta device: load its weights first")
    after = _fitting(logits.detach().to(device="cpu", dtype=torch.float32), declared(model), tolerance)
    if after is None:
        raise LogitsChanged(
            f"the {side} ({type(model).__name__}) changes its logits after the head by more than a scale, a tanh "
            "soft-cap or a bias: the loss would be computed on other logits than the model's; use DistillHead directly"
        )
    return after


def _fitting(seen: Tensor, declared_transform: LogitTransform, tolerance: float) -> AfterHead | None:
    """What makes the logits `seen` `[NUM_ROWS, V]` of the known rows, within a relative and absolute `tolerance`."""
    ramp = known_rows(seen.shape[-1])[1]
    bias, shaped = seen[0], seen[1] - seen[0]

    def fits(transform: LogitTransform) -> bool:
        return torch.allclose(transform.apply(ramp), shaped, rtol=tolerance, atol=tolerance)

    linear = LogitTransform(scale=float(shaped[-1]) / _LIMIT)
    if bias.any():
        possible = (transform for transform in (LogitTransform(), linear) if transform.scale and fits(transform))
        return next((AfterHead(transform, bias / transform.scale) for transform in possible), None)
    capped = LogitTransform(scale=float(seen[3, 0]) / _SMALL, softcap=float(seen[2, 0]))
    every = (LogitTransform(), declared_transform, linear, capped)
    return next((AfterHead(transform) for transform in every if fits(transform)), None)


def other_size(model: nn.Module, side: str, wanted: int, returned: int) -> LogitsChanged:
    """The error about logits that are cut or padded after the head."""
    return LogitsChanged(
        f"the {side} ({type(model).__name__}) returns {returned} logits of the {wanted} that its head gives: the loss "
        "would be computed on other logits than the model's; use DistillHead directly"
    )


def changed_by_place(model: nn.Module, side: str) -> LogitsChanged:
    """The error about known rows that came out differently in different places."""
    return LogitsChanged(
        f"the {side} ({type(model).__name__}) changes its logits after the head by what depends on the position or on "
        "the hidden states: the loss would be computed on other logits than the model's; use DistillHead directly"
    )


def declared(model: nn.Module) -> LogitTransform:
    """The transform by the attributes that several architectures share; to be checked by measuring."""
    _, text = configurations(model)
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = getattr(text, "logit_scale", None)
    return LogitTransform(float(scale) if isinstance(scale, int | float) else 1.0, float(softcap) if softcap else None)
