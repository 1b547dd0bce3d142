"""Micro-batches, steps and evaluations that do not fit together, found before anything is loaded. Imports no torch."""

from __future__ import annotations

from kd_plugin.settings.distill import sorts
from kd_plugin.settings.run import RunConfig

__all__ = ["schedule_problems"]


def schedule_problems(config: RunConfig) -> list[str]:
    """One line for each fault of what a step is made of and of what evaluations decide."""
    return [*_teacher_ahead_problems(config), *_step_problems(config), *_metric_problems(config)]


def _teacher_ahead_problems(config: RunConfig) -> list[str]:
    together, each = config.teacher.micro_batch_size, config.train.micro_batch_size
    if together in (None, "auto") or together % each == 0:
        return []
    return [
        f"teacher.micro_batch_size is {together}, wanted a multiple of train.micro_batch_size, {each}: it reads "
        "whole micro-batches of the student"
    ]


def _step_problems(config: RunConfig) -> list[str]:
    """What keeps `train.tokens_per_step` from being made up, on whatever number of ranks."""
    train, seq_len = config.train, config.data.seq_len
    each = train.micro_batch_size * seq_len * train.gradient_accumulation_steps
    if train.tokens_per_step is None or train.tokens_per_step % each == 0:
        return []
    steps = train.gradient_accumulation_steps
    sum_up = f"micro_batch_size {train.micro_batch_size} x seq_len {seq_len}"
    sum_up += f" x gradient_accumulation_steps {steps}" if steps > 1 else ""
    return [
        f"train.tokens_per_step is {train.tokens_per_step}, wanted a multiple of {sum_up} = {each} tokens, on any "
        "number of ranks: change one of them"
    ]


def _metric_problems(config: RunConfig) -> list[str]:
    """Metrics that an evaluation will not have: of a teacher that is not asked, or by tokens that do not correspond."""
    stop, best = config.train.stop_on, config.train.export_best
    named = {"train.stop_on.metric": stop and stop.metric, "train.export_best": best}
    terms = config.distill.terms
    sorting = any(sorts(name) for name in ([term.name for term in terms] if terms else [config.distill.divergence]))
    faults = []
    for setting, metric in named.items():
        if not config.distill.soft_weight and metric not in (None, "perplexity", "hard_loss"):
            faults.append(
                f"{setting} is {metric}, which needs the teacher, but distill.soft_weight is 0: use perplexity"
            )
        elif metric in ("kl_t1", "top1_agreement", "acceptance_rate") and sorting:
            why = "needs tokens that correspond, but uld sorts them"
            faults.append(f"{setting} is {metric}, which {why}: use perplexity")
    return faults
