"""What a class does with labels, learnt from its own loss and its own logits on a small model.

Nothing here knows a class by name: each function runs the model and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sweep import dense


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to rounding of the larger values."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3))


def _equal(value: Tensor, loss: float) -> bool:
    return abs(float(value) - loss) <= 2e-5 * max(1.0, abs(loss))


@contextmanager
def without_router_loss(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts leave their router's loss out."""
    own = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    switched = [config for config in own.values() if getattr(config, "output_router_logits", False)]
    for config in switched:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in switched:
            config.output_router_logits = True


@torch.no_grad()
def label_convention(model: nn.Module, batch: dict[str, Any]) -> tuple[str, str]:
    """`shifted`, `unshifted`, `other` or `none` (no loss of labels), and a note on what was found."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return "none", "takes no labels"
    with without_router_loss(model):
        output = dense.run(model, batch)
    loss, logits = output.get("loss"), output.get("logits")
    if loss is None or not isinstance(logits, Tensor):
        return "none", f"gives {', '.join(output)}"
    return _convention_of(loss, logits, batch["labels"])


def _convention_of(loss: Tensor, logits: Tensor, labels: Tensor) -> tuple[str, str]:
    if loss.numel() != 1 or not torch.isfinite(loss).all():
        return "other", f"its loss is {loss.flatten()[:3].tolist()}"
    if logits.shape[:-1] != labels.shape:
        note = f"logits {list(logits.shape)} for labels {list(labels.shape)}"
        if logits.ndim == 3 and labels.ndim == 2 and logits.shape[1] > labels.shape[1]:
            tail, _ = _convention_of(loss, logits[:, -labels.shape[1] :], labels)
            if tail in dense.CONVENTIONS:
                return "other", f"{note}: the last rows are {tail}"
        return "other", note
    for name, rows in dense.CONVENTIONS.items():
        if _equal(dense.cross_entropy(rows(logits, labels)), float(loss)):
            return name, ""
    return "other", _other_reductions(float(loss), logits, labels)


def _other_reductions(loss: float, logits: Tensor, labels: Tensor) -> str:
    found = []
    for name, rows in dense.CONVENTIONS.items():
        own = rows(logits, labels)
        each = F.cross_entropy(own.logits.float(), own.targets, reduction="none", ignore_index=dense.IGNORE)
        every = own.targets.masked_fill(own.targets == dense.IGNORE, 0)
        for reduction, value in {
            "summed": each.sum(),
            "mean over masked rows too": each.mean(),
            "masked labels count as 0": dense.cross_entropy(dense.Rows(own.logits, every)),
        }.items():
            if _equal(value, loss):
                return f"{name}, {reduction}"
        found.append(f"{name} {float(dense.cross_entropy(own)):.5f}")
    return f"its loss is {loss:.5f}, where " + ", ".join(found)


@torch.no_grad()
def leaves_out_masked(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether its own loss skips the label of a token that `attention_mask` hides."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None or mask is None or mask.shape != labels.shape or not mask.all(1).any():
        return False
    row = int(mask.all(1).nonzero()[0])
    hidden = {**batch, "labels": labels.clone(), "attention_mask": mask.clone()}
    hidden["attention_mask"][row, -1] = 0
    found = []
    for label in (dense.IGNORE, *labels[labels != dense.IGNORE].unique()[:2].tolist()):
        hidden["labels"][row, -1] = label
        try:
            with without_router_loss(model):
                found.append(dense.run(model, hidden).get("loss"))
        except Exception:  # it takes no such mask
            return False
    return all(isinstance(loss, Tensor) and loss.numel() == 1 and _equal(loss, float(found[0])) for loss in found)


@torch.no_grad()
def added_loss(model: nn.Module, batch: dict[str, Any]) -> float:
    """What the model adds to its loss while its configuration says `output_router_logits`."""
    output = dense.run(model, batch)
    with without_router_loss(model):
        plain = dense.run(model, batch)
    return float(output.loss - plain.loss) if output.get("loss") is not None else 0.0


def wrapped(labels: Tensor, pad: int) -> Tensor:
    """mBART's decoder inputs: the last token that is no padding goes to the front."""
    filled = labels.masked_fill(labels == dense.IGNORE, pad)
    last = filled.gather(1, (filled.ne(pad).sum(1) - 1).unsqueeze(-1))
    return torch.cat([last, filled[:, :-1]], dim=1)


def start_in_front(labels: Tensor, start: int, pad: int) -> Tensor:
    """BART's and T5's: the start token goes to the front."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == dense.IGNORE, pad)


@torch.no_grad()
def decoder_inputs(model: nn.Module, batch: dict[str, Any]) -> list[str]:
    """Which decoder inputs give the logits that the model gives for these labels; all ways that do.

    Empty for a model that takes no decoder inputs, and where no known way gives those logits.
    """
    labels, wanted = batch["labels"], dense.run(model, batch).logits
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters or labels.ndim != 2:
        return []
    if _same(model, batch, torch.zeros_like(labels), wanted):
        return []  # they make no difference
    return [name for name, ids in _candidates(model, batch).items() if _same(model, batch, ids, wanted)]


def _candidates(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    labels, configs = batch["labels"], {"config": model.config, **_parts(model.config)}
    known: dict[str, Tensor] = {}
    for method in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, method):
            try:
                known[method] = getattr(model, method)(labels.clone())
            except (TypeError, ValueError):
                continue
    for name, config in configs.items():
        pad, start, bos = (getattr(config, f"{kind}_token_id", None) for kind in ("pad", "decoder_start", "bos"))
        if not isinstance(pad, int):
            continue
        if isinstance(start, int):
            known[f"{name}.decoder_start_token_id in front"] = start_in_front(labels, start, pad)
        if isinstance(bos, int):
            known[f"{name}.bos_token_id in front"] = start_in_front(labels, bos, pad)
        known[f"last token in front, padded with {name}.pad_token_id"] = wrapped(labels, pad)
        if isinstance(batch.get("input_ids"), Tensor):
            known[f"last token of input_ids in front of input_ids, padded with {name}.pad_token_id"] = wrapped(
                batch["input_ids"], pad
            )
    return known


def _parts(config: Any) -> dict[str, Any]:
    return {f"config.{n}": p for n in getattr(config, "sub_configs", {}) if (p := getattr(config, n, None)) is not None}


def _same(model: nn.Module, batch: dict[str, Any], ids: Tensor, wanted: Tensor) -> bool:
    """With a mask of the padding in them, too: some models make one along with the inputs."""
    parameters = inspect.signature(model.forward).parameters
    given = {name: value for name, value in batch.items() if name != "labels"} | {"decoder_input_ids": ids}
    if "use_cache" in parameters:
        given["use_cache"] = False
    pads = {getattr(config, "pad_token_id", None) for config in (model.config, *_parts(model.config).values())}
    masks = [ids.ne(pad) for pad in pads if isinstance(pad, int)] if "decoder_attention_mask" in parameters else []
    tries = [given, *({**given, "decoder_attention_mask": mask.long()} for mask in masks)]
    for inputs in tries:
        try:
            if close(dense.run(model, inputs).logits, wanted):
                return True
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
    return False
