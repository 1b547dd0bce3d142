"""One batch for any small model: text, and what its forward reads besides."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.sweep.special import INPUTS

ROWS, LENGTH, LABELS = 2, 12, 9
TEXT = range(5, 96)
"""Ids that are text in every small configuration: the special tokens lie outside."""


def text(seed: int, length: int = LENGTH) -> Tensor:
    """Ids `[ROWS, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT.start, TEXT.stop, (ROWS, length), generator=generator)


def batch_for(model: nn.Module) -> dict[str, Any]:
    """Inputs and `labels`; some labels are masked, and the last token of one row is padding.

    An encoder-decoder gets labels of another length than its input, and no decoder inputs.
    """
    parameters = inspect.signature(model.forward).parameters
    batch: dict[str, Any] = INPUTS.get(type(model).__name__, dict)()
    if "input_ids" in parameters:
        batch.setdefault("input_ids", text(3))
    ids = batch.get("input_ids")
    if "attention_mask" in parameters and ids is not None and "attention_mask" not in batch:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][-1, -1] = 0
    if "labels" not in batch:
        encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        labels = text(4, LABELS) if encoder_decoder else (text(3) if ids is None else ids.clone())
        labels[0, 3] = labels[0, 4] = labels[-1, -1] = -100
        batch["labels"] = labels.masked_fill(labels >= TEXT.stop, -100)
    return {name: value for name, value in batch.items() if value is not None}
