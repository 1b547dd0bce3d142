"""What a run's settings come to: its mode, its accumulation steps, the learning rate of each step, the seeds."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import torch

from kd_plugin.engines.protocol import EngineError
from kd_plugin.settings.run import RunConfig, TrainConfig

logger = logging.getLogger(__name__)


def parallel_mode(config: RunConfig, world_size: int) -> str:
    """Resolve `train.parallel` for `world_size` ranks: "single", "ddp", "fsdp", "fsdp1" or "deepspeed".

    Raises:
        EngineError: one process is wanted but several were started.
    """
    mode = config.train.parallel
    if mode == "auto":
        return "fsdp" if world_size > 1 else "single"
    if mode == "fsdp1" and world_size == 1:
        return "single"  # FSDP1 has nothing to do there, and says so at length
    if mode == "single" and world_size > 1:
        raise EngineError(
            f"train.parallel is single but {world_size} processes were started: "
            "launch one process, or set train.parallel to fsdp, fsdp1, ddp or deepspeed"
        )
    return mode


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def accumulation_steps(train: TrainConfig, *, seq_len: int, world_size: int) -> int:
    """Micro-batches per rank and step, from `tokens_per_step` where it is set.

    Raises:
        EngineError: when the tokens do not divide, or contradict an explicit number of steps.
    """
    if train.tokens_per_step is None:
        return train.gradient_accumulation_steps
    tokens = train.micro_batch_size * seq_len * world_size
    steps, rest = divmod(train.tokens_per_step, tokens)
    sum_up = f"micro_batch_size {train.micro_batch_size} x seq_len {seq_len} x {world_size} ranks = {tokens}"
    if rest or not steps:
        raise EngineError(
            f"train.tokens_per_step {train.tokens_per_step} is no multiple of {sum_up} tokens: "
            "change tokens_per_step, micro_batch_size or the number of ranks"
        )
    # 1 is the default, and what a saved config.yaml spells out.
    if train.gradient_accumulation_steps not in (1, steps):
        raise EngineError(
            f"train.tokens_per_step {train.tokens_per_step} with {sum_up} makes {steps} accumulation steps, "
            f"but gradient_accumulation_steps is {train.gradient_accumulation_steps}: remove one of the two"
        )
    return steps


def with_steps(config: RunConfig, *, num_sequences: int, sequences_per_step: int) -> RunConfig:
    """`config` with the steps that `train.epochs` and `train.warmup_ratio` come to.

    They go before an explicit number of steps, such as a recipe's, with a warning.
    """
    train, steps = config.train, {}
    if train.epochs is not None:
        steps["max_steps"] = max(1, math.ceil(train.epochs * num_sequences / sequences_per_step))
        _say("epochs", train.epochs, "max_steps", train.max_steps, steps["max_steps"])
    last = steps.get("max_steps", train.max_steps)
    if train.warmup_ratio is not None:
        steps["warmup_steps"] = round(train.warmup_ratio * last)
        _say("warmup_ratio", train.warmup_ratio, "warmup_steps", train.warmup_steps, steps["warmup_steps"])
    train = train.model_copy(update=steps)
    if train.warmup_steps > last:
        logger.warning("train.warmup_steps %d: the peak rate is never reached", train.warmup_steps)
    return config.model_copy(update={"train": train})


def _say(name: str, value: float, other: str, given: int, steps: int) -> None:
    if given in (TrainConfig.model_fields[other].default, steps):  # as left out, or as a saved config.yaml has it
        logger.info("train.%s %g: train.%s is %d", name, value, other, steps)
    else:
        logger.warning("train.%s %g: train.%s is %d instead of %d", name, value, other, steps, given)


def micro_batches_together(config: RunConfig) -> int | None:
    """Micro-batches of a rank that the teacher reads at once, by `teacher.micro_batch_size`; None: by memory."""
    if config.teacher.micro_batch_size == "auto":
        return None
    return max(1, (config.teacher.micro_batch_size or 0) // config.train.micro_batch_size)


def in_even_forwards(micro_batches: int, most: int) -> int:
    """Micro-batches at once, `most` or fewer, with which as few forwards read them all, each about as many."""
    forwards = -(-micro_batches // most)
    return -(-micro_batches // forwards)


def learning_rate_at(step: int, train: TrainConfig) -> float:
    """The rate of optimizer step `step` (counted from 1): linear warm-up, then the schedule's descent.

    The peak is reached at step `warmup_steps` (or 1), `min_lr_ratio` of it at `max_steps`.
    """
    peak, warmup = train.learning_rate, train.warmup_steps
    if step < warmup:
        return peak * step / warmup
    start = max(warmup, 1)
    done = min(1.0, max(0.0, (step - start) / max(1, train.max_steps - start)))
    if train.schedule == "constant":
        shape = 1.0
    elif train.schedule == "linear":
        shape = 1.0 - done
    else:
        shape = 0.5 * (1.0 + math.cos(math.pi * done))
    floor = train.min_lr_ratio if train.schedule != "constant" else 0.0
    return peak * (floor + (1.0 - floor) * shape)
