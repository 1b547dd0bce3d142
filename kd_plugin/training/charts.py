"""What TensorBoard draws of the numbers: charts with several lines, a description of each tag, the hparams.

TensorBoard draws one chart for each tag and one line in it for each run, so the lines of a chart are runs of their
own, in sub-folders, that share a tag. Groups are sorted by name, so that these come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kd_plugin.settings.run import RunConfig

__all__ = ["CHARTS", "LAYOUT", "METRICS", "describe", "flat", "hyperparameters", "lines_of"]

CHARTS: dict[str, dict[str, str]] = {
    "a_loss/components": {
        "total": "train/loss",
        "soft": "train/soft_loss",
        "hard": "train/hard_loss",
        "router": "train/router_loss",
    },
    "a_loss/kl_vs_eval": {"train": "distill/kl_t1", "eval": "eval/kl_t1"},
    "a_loss/hard_vs_eval": {"train": "train/hard_loss", "eval": "eval/hard_loss"},
    "b_agreement/top1": {"train": "distill/top1_agreement", "eval": "eval/top1_agreement"},
    "b_agreement/acceptance": {"train": "distill/acceptance_rate", "eval": "eval/acceptance_rate"},
}
"""Tag of each chart -> name of each line -> the tag whose numbers it has."""

LAYOUT: dict[str, dict[str, tuple[str, list[str]]]] = {
    group: {title: ("Multiline", [f"^{tag}$" for tag in tags]) for title, tags in charts.items()}
    for group, charts in {
        "loss": {
            "soft, hard, total": ["train/loss", "train/soft_loss", "train/hard_loss"],
            "KL(teacher to student), training and held-out": ["distill/kl_t1", "eval/kl_t1"],
            "cross-entropy, training and held-out": ["train/hard_loss", "eval/hard_loss"],
        },
        "agreement": {
            "top-1 agreement": ["distill/top1_agreement", "eval/top1_agreement"],
            "acceptance rate": ["distill/acceptance_rate", "eval/acceptance_rate"],
            "entropies": ["distill/teacher_entropy", "distill/student_entropy"],
        },
        "memory and speed": {
            "peak memory, GiB": ["memory/.*peak.*"],
            "tokens per second": ["train/tokens_per_second"],
            "milliseconds per step": ["train/step_time_ms", "time/.*_ms"],
        },
    }.items()
}
"""The tab "Custom Scalars"; a line there is every tag of a run that matches one of the expressions."""

METRICS = ("eval/kl_t1", "eval/perplexity", "eval/top1_agreement")
"""What the tab "HParams" compares runs by."""

_CHARTED = {
    "a_loss/components": "The loss that is optimised and its parts before their weights: total = soft_weight * "
    "soft + hard_weight * hard (+ router).",
    "a_loss/kl_vs_eval": "KL(teacher to student) at temperature 1, in nats: training text against held-out.",
    "a_loss/hard_vs_eval": "Cross-entropy in nats: training text (as optimised, label smoothing included) "
    "against held-out text (plain).",
    "b_agreement/top1": "Share of tokens on which student and teacher prefer the same next token.",
    "b_agreement/acceptance": "Sum over the vocabulary of min(p, q): how often speculative decoding would accept.",
}
_MEASURED = {
    "loss": "What is optimised, per valid token: soft_weight * soft_loss + hard_weight * hard_loss (+ router_loss).",
    "soft_loss": "Divergence from the teacher, times temperature ** temperature_power; per valid token.",
    "hard_loss": "Cross-entropy with the labels, in nats per token with a label.",
    "router_loss": "What a mixture of experts adds to its own loss, its coefficients included.",
    "grad_norm": "Norm of the whole gradient of this step, before clipping.",
    "lr": "Learning rate of this step.",
    "tokens_per_second": "Tokens read per second, over all ranks.",
    "step_time_ms": "Milliseconds per optimizer step.",
    "teacher_entropy": "Entropy of the teacher's next-token distribution at temperature 1, in nats.",
    "student_entropy": "Entropy of the student's next-token distribution at temperature 1, in nats.",
    "top1_agreement": _CHARTED["b_agreement/top1"],
    "acceptance_rate": _CHARTED["b_agreement/acceptance"],
    "kl_t1": "KL(teacher to student) at temperature 1 in nats, whatever the objective.",
    "perplexity": "exp of the cross-entropy on held-out text.",
    "temperature": "Temperature of the soft loss; a setting.",
    "valid_tokens": "Tokens that count since the last logged step, over all ranks: those with a label, or all with "
    "distill.soft_on all.",
    "trained_tokens": "Tokens with a label since the last logged step, over all ranks; where others count, too.",
    "chunk_size": "Rows of hidden states whose logits exist at a time; a setting, or settled in the first step.",
    "peak_allocated_gib": "Most GPU memory that tensors took, in GiB, of the largest rank.",
    "peak_reserved_gib": "Most GPU memory that the allocator held, in GiB, of the largest rank.",
    "peak_rss_gib": "Most host memory of the process, in GiB, of the largest rank.",
    "loss_peak_gib": "Most memory that the loss took above its inputs, in GiB.",
    "logits_avoided_gib": "Memory of the full logits of both models, which were never held, in GiB.",
    "teacher_ms": "Milliseconds per step in the teacher, on rank 0.",
    "student_ms": "Milliseconds per step in everything else, the student's forward and backward included, on rank 0.",
    "loss_ms": "Milliseconds per step in the loss, on rank 0.",
}


def describe(tag: str) -> str:
    """What the numbers of `tag` mean, in Markdown; empty for a tag that is not known here."""
    folder, _, name = tag.partition("/")
    about = _CHARTED.get(tag) or _MEASURED.get(name, "")
    return f"On held-out text, at temperature 1. {about}" if about and folder == "eval" else about


def lines_of(values: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """The points that numbers under their tags add to the charts: (line, tag of the chart, value)."""
    for chart, lines in CHARTS.items():
        yield from ((line, chart, values[source]) for line, source in lines.items() if source in values)


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """The settings of a run that runs are compared by, as `section.key`; lists as text, nothing that is null."""
    sections = config.model_dump(mode="json", exclude={"log", "deepspeed"})
    return dict(flat(sections, ""))


def flat(value: Any, name: str) -> Iterator[tuple[str, bool | int | float | str]]:
    """The leaves of nested dictionaries below `name`, as `name.key`; lists as text, nothing that is null."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield name, str(value)
    elif value is not None:
        yield name, value
