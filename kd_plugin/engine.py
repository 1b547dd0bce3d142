"""What the training loop asks of a parallel backend, and what all backends share.

Notable decisions:
- three adapters stand behind one protocol: FSDP2 (which also serves one process and DDP's layout, so that all
  three compute in the same precision), FSDP1 and DeepSpeed;
- the loss arrives divided by the valid tokens of the whole step over all ranks, so an adapter only has to
  undo its backend's averaging over ranks;
- host numbers (token counts, memory) are reduced over gloo also on GPUs, so that counting never waits for
  the device.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_plugin import checks, processor
from kd_plugin.collectives import all_reduce, end_process_groups, wait_for_gloo
from kd_plugin.config import RunConfig, TrainConfig
from kd_plugin.precision import automatic_dtype, slow_dtype, with_dtypes

__all__ = [
    "DTYPES",
    "Engine",
    "EngineError",
    "Placement",
    "accumulation_steps",
    "learning_rate_at",
    "parallel_mode",
    "parameter_groups",
    "reduce_numbers",
    "seed_everything",
    "share_timeout",
    "start_process_group",
]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineError(ValueError):
    """The launch and the training settings do not fit together."""


@dataclass(frozen=True)
class Placement:
    """This process among all: its device, its rank, and whether it started the process group itself."""

    device: torch.device
    rank: int
    world_size: int
    owns_group: bool

    def settled_precision(self, config: RunConfig) -> RunConfig:
        """`config` with `dtype: auto` replaced, alike on all ranks; raises ValueError for one that the device lacks."""
        if self.device.type == "cpu" and self.world_size > 1:
            processor.settle([reduce_numbers(processor.emulated_here(), op="max")])
        if "auto" in (config.student.dtype, config.teacher.dtype):
            chosen, why = automatic_dtype(self.device)
            slowest = reduce_numbers({"float32": chosen == "float32"}, op="max")
            if slowest["float32"] and chosen != "float32":
                chosen, why = "float32", "another rank's device needs it"
            logger.info("dtype: auto -> %s (%s)", chosen, why)
            config = with_dtypes(config, chosen)
        for role in ("teacher", "student"):
            name = getattr(config, role).dtype
            checks.half_precision(f"{role}.dtype", DTYPES[name], self.device)
            if warning := slow_dtype(name, self.device):
                logger.warning("%s.dtype %s", role, warning)
        return config

    def close(self) -> None:
        """End the process group if this run started it; in any case the process may end afterwards."""
        if self.owns_group:
            end_process_groups()
        else:
            wait_for_gloo()


class Engine(Protocol):
    """A student and a teacher on their devices, and the optimizer that trains the student."""

    student: nn.Module
    """What to call: the sharded student, or DeepSpeed's engine around it."""
    teacher: nn.Module
    module: nn.Module
    """The Hugging Face student itself, whose forward the plugin owns."""
    torch_optimizer: torch.optim.Optimizer | None
    """Whose state is this rank's, without padding; None where only its backend knows that (DeepSpeed)."""
    applied_notes: list[str]
    """Lines for the log: what was filled in or could not be applied."""

    def forward_backward(self, inputs: Mapping[str, Tensor], *, num_items: int, is_last: bool) -> Tensor:
        """One micro-batch: its loss, summed and divided by `num_items`, into the gradients; returns it (0-d)."""
        ...

    def step(self, learning_rate: float) -> Tensor | None:
        """One optimizer step at this rate; returns the global gradient norm before clipping (0-d), if it is known."""
        ...

    def evaluate(self, inputs: Mapping[str, Tensor], *, num_items: int) -> Tensor:
        """The forward pass of one held-out micro-batch; its numbers are in the plugin's metrics. Returns its loss."""
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole student on rank 0's CPU (empty elsewhere). All ranks must call this."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer into `folder`. All ranks must call this."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. All ranks must call this."""
        ...


def parallel_mode(config: RunConfig, world_size: int) -> str:
    """Resolve `train.parallel`; raises EngineError when one process is wanted but several were started."""
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


def start_process_group(timeout_s: int) -> Placement:
    """Join the ranks that torchrun or deepspeed started; without a launcher this is a group of one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # DeepSpeed reads it once, at its first import, which Transformers does by itself where it is installed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    owns_group = not dist.is_initialized()
    if owns_group:
        options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
        if "RANK" not in os.environ:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
    return Placement(device, dist.get_rank(), dist.get_world_size(), owns_group)


def share_timeout(timeout_s: int) -> None:
    """Give every process group the run's timeout: those that meshes and DeepSpeed made for themselves have torch's."""
    world = getattr(dist.distributed_c10d, "_world", None)
    for group in list(getattr(world, "pg_map", ())):
        # On a rank outside of it, and in older releases, it stays as it is.
        with suppress(AttributeError, ValueError):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def reduce_numbers(values: Mapping[str, float], *, op: str = "sum") -> dict[str, float]:
    """Sum or maximum (`op` "sum" or "max") over all ranks, by one collective on the host."""
    if dist.get_world_size() == 1:
        return dict(values)
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    operation = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    all_reduce(packed, None, f"the numbers {', '.join(values)}", op=operation)
    return dict(zip(values, packed.tolist(), strict=True))


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) do not.

    Call this before DeepSpeed or FSDP: a ZeRO-3 parameter is flat and would look like a vector.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise EngineError("the student has no trainable parameter: student.freeze matches all of them")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
