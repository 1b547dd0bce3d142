"""Whether a head does what a plain linear layer does with its weight and bias.

Notable decisions:
- the loss multiplies by the weight itself, so whatever a subclass's own forward, a hook or a replaced forward does
  besides (a scale for each token, a second projection, a rounding cast) would be lost in silence;
- it is judged by effect: the head is called with known hidden states, and its logits must be those of
  `nn.functional.linear`. A hook that only looks, or a cast to a wider type, passes;
- where the weight is elsewhere (offloaded, sharded, on meta) nothing can be tried, and only what is known to be
  plain passes: `nn.Linear`'s own forward, with no hooks but those of the libraries that bring the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd_plugin.distributed.layout import is_dtensor
from kd_plugin.plugin.replaced_forward import home_of
from kd_plugin.plugin.undisturbed import undisturbed

_WRAPPERS = ("torch.distributed.", "deepspeed.", "accelerate.", "kd_plugin.")
_ROWS = 3
_SCALES = (1e-2, 1.0, 30.0)


def check_plain(name: str, head: nn.Linear) -> None:
    """Refuse a head that is more than `hidden @ weight.T + bias`.

    Args:
        name: for the message, such as "the student's head".
        head: a linear layer as its model has it, hooks and replaced forward included.

    Raises:
        ValueError: its logits differ from the plain product's, or that cannot be known.
    """
    if parametrize.is_parametrized(head):
        raise ValueError(
            f"{name} has a parametrized weight, which is computed anew for each use: call "
            "torch.nn.utils.parametrize.remove_parametrizations(head, 'weight') before attach()"
        )
    suspects = list(_suspects(head))
    if not suspects:
        return
    what = " and ".join(suspects)
    if not _is_here(head):
        raise ValueError(
            f"{name} has {what}, and its weight is not here to see what that does: attach before the weight is moved, "
            "sharded or offloaded, or take it off"
        )
    if not _same_as_linear(head):
        raise ValueError(
            f"{name} has {what}, so its logits are not hidden @ weight.T + bias: the loss would be computed on other "
            "logits than the model's; take it off, or put a plain torch.nn.Linear there"
        )


def _suspects(head: nn.Linear) -> Iterator[str]:
    kind = type(head)
    if kind.forward is not nn.Linear.forward:
        yield f"a forward of its own ({kind.__module__}.{kind.__qualname__})"
    own = head.__dict__.get("_old_forward", head.__dict__.get("forward")) if hasattr(head, "_hf_hook") else None
    own = head.__dict__.get("forward") if own is None else own
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        yield "a replaced forward"
    for hooks in (head._forward_pre_hooks, head._forward_hooks):
        for hook in hooks.values():
            if not home_of(hook).startswith(_WRAPPERS):
                yield f"a forward hook ({home_of(hook)})"


def _is_here(head: nn.Linear) -> bool:
    weight = head.weight
    return not (weight.is_meta or is_dtensor(weight) or weight.numel() == 0 or weight.dim() != 2)


def _same_as_linear(head: nn.Linear) -> bool:
    """Judged at several sizes of the hidden states, in training and in evaluation: norms, caps and dropout show."""
    with undisturbed(head), torch.no_grad():
        return all(_is_linear_at(head.train(training), scale) for training in (True, False) for scale in _SCALES)


def _is_linear_at(head: nn.Linear, scale: float) -> bool:
    weight = head.weight
    generator = torch.Generator(device="cpu").manual_seed(0)
    hidden = torch.randn(1, _ROWS, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    hidden *= scale * torch.logspace(0, 1, _ROWS, dtype=torch.float32, device="cpu")[:, None]  # rows of unequal norm
    hidden = hidden.to(device=weight.device, dtype=weight.dtype)
    logits = head(hidden)
    # A weight that a pre-hook computes (weight_norm) is the one that this call has made.
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    wanted = F.linear(hidden.to(wide), head.weight.to(wide), bias)
    if not isinstance(logits, Tensor) or logits.shape != wanted.shape:
        return False
    # In half precision a plain product is rounded too, but not by the same factor everywhere.
    half = weight.dtype not in (torch.float32, torch.float64)
    given, tolerance = logits.to(wide), 2e-2 if half else 1e-4
    factors = (given * wanted).sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    alike = torch.allclose(factors, torch.ones_like(factors), rtol=0, atol=3e-3 if half else 1e-4)
    largest = wanted.abs().amax(-1, keepdim=True)
    return alike and bool(((given - wanted).abs() <= tolerance * (wanted.abs() + largest)).all())
