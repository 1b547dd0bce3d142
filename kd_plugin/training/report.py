"""The table at the end of a run, and the continuations in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kd_plugin.data.encoding import prompt_ids
from kd_plugin.training.console import duration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["continuations", "diverged", "quality_rows", "report"]

_QUALITY = {
    "perplexity": ("held-out perplexity", "{:.2f}"),
    "kl_t1": ("KL(teacher||student), nats", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.1%}"),
    "hard_loss": ("cross-entropy, nats", "{:.4f}"),
}


def continuations(
    models: Mapping[str, nn.Module], tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int
) -> dict[str, str]:
    """Name -> the model's greedy continuation of `prompt`, by `num_tokens`; sharded models need all ranks to call."""
    return {name: _continuation(model, tokenizer, prompt, num_tokens) for name, model in models.items()}


@torch.no_grad()
def _continuation(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int) -> str:
    """The greedy continuation of one model, without a key-value cache.

    A few tokens are not worth depending on every model's cache under sharding.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)  # [1, S]
    start = ids.shape[1]
    for _ in range(num_tokens):
        following = model(input_ids=ids).logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, 1]
        if following.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following], dim=1)
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def diverged(history: Sequence[Mapping[str, float]], after: Mapping[str, float]) -> str:
    """One line about a student that predicts nothing any more, or an empty text. The same on all ranks."""
    if math.isfinite(after["hard_loss"]):
        return ""
    steps = (f"{values['step']:.0f}" for values in history if not math.isfinite(values["loss"]))
    return (
        f"training diverged: the held-out cross-entropy is {after['hard_loss']} (first non-finite loss logged at step "
        f"{next(steps, '-')}); nothing was exported: lower train.learning_rate, or raise train.warmup_steps"
    )


def report(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    history: Sequence[Mapping[str, float]],
    seconds: Mapping[str, float],
    memory: Mapping[str, float],
    samples: Mapping[str, str],
    places: Mapping[str, Path],
) -> str:
    """The table as text: quality before and after, progress, wall time, peak memory, continuations, files.

    `history` holds the numbers of each logged step, in order.
    """
    lines = ["", f"{'on held-out text':<28}{'before':>12}{'after':>12}{'change':>10}"]
    lines += [f"{label:<28}{old:>12}{new:>12}{change:>10}" for label, old, new, change in quality_rows(before, after)]
    lines += ["", *progress] if (progress := _progress(history, before, after)) else []
    lines += ["", *_resources(seconds, memory)]
    lines += [f"{name:<11} {text!r}" for name, text in samples.items()]
    lines += [f"{name:<11} {place}" for name, place in places.items()]
    return "\n".join(lines)


def quality_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """What was measured before and after, as text: (name, before, after, change)."""
    names = [name for name in _QUALITY if name in before and name in after]
    return [_quality_row(name, before[name], after[name]) for name in names]


def _quality_row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    label, form = _QUALITY[name]
    if name == "top1_agreement":
        change = f"{(after - before) * 100:+.1f} pp"
    else:
        change = f"{after / before - 1:+.1%}" if before else "-"
    return label, form.format(before), form.format(after), change


def _resources(seconds: Mapping[str, float], memory: Mapping[str, float]) -> list[str]:
    split = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    peaks = ", ".join(
        f"{name.removesuffix('_gib').replace('_', ' ')} {value:.2f} GiB" for name, value in memory.items()
    )
    lines = [f"wall time   {duration(sum(seconds.values()))}: {split}"]
    return [*lines, f"peak memory {peaks} (largest rank)"] if peaks else lines


def _progress(
    history: Sequence[Mapping[str, float]], before: Mapping[str, float], after: Mapping[str, float]
) -> list[str]:
    """How far the student has come towards its teacher: one line each for training and held-out text."""
    lines = []
    soft = [values["soft_loss"] for values in history if "soft_loss" in values]
    if fifth := len(soft) // 5:
        first, last = (sum(part) / fifth for part in (soft[:fifth], soft[-fifth:]))
        ratio = f"{last / first:.3f}" if first else "-"
        lines.append(f"soft loss, last fifth / first fifth of the steps: {ratio} ({last:.4f} / {first:.4f})")
    if before.get("kl_t1") and "kl_t1" in after:
        old, new = before["kl_t1"], after["kl_t1"]
        change = f"reduced by {1 - new / old:.1%}" if new <= old else f"rose to {new / old:.3g} times"
        lines.append(f"KL(teacher||student) {change} ({old:.4f} -> {new:.4f} nats)")
    return lines
