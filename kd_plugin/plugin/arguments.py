"""Arguments of `attach`, and of an attached forward, that are not even of the right kind."""

from __future__ import annotations

import torch
from torch import Tensor


def labels(given: object) -> None:
    """Labels that are a tensor."""
    if not isinstance(given, Tensor):
        raise ValueError(f"labels is a {type(given).__name__}; wanted an int64 tensor [B, S], as the model takes them")


def language_model(model: object, side: str) -> None:
    """A module where a model is wanted."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"the {side} is a {type(model).__name__}; wanted a loaded model, such as "
            "transformers.AutoModelForCausalLM.from_pretrained(...)"
        )
