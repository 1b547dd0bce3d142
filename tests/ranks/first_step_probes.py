"""What ranks do in their first step: refuse what does not fit together. Every probe takes this process's rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines import fsdp_units
from tests.ranks.attach_cases import make_model
from tests.ranks.sharded_heads import (
    STUDENT_WIDTH,
    make_config,
    shard_head,
    step,
)
from tests.ranks.worker import save_probes

UNITS = ("head", "fsdp2 root", "fsdp1")  # the gather of the latter two comes before the student's forward


def mismatch(rank: int) -> dict[tuple[str, str], tuple[str, float]]:
    """By planted difference on the last rank, and unit of the head: message and seconds."""
    last = rank == dist.get_world_size() - 1
    plants: dict[str, dict[str, Any]] = {
        "exchange": {"exchange": "weight" if last else "stats"},
        "chunk_size": {"exchange": "stats", "chunk_size": 9 if last else 8},
        "divergence": {"exchange": "stats", "divergence": "jsd" if last else "forward_kl"},
        "student vocabulary, stats": {"exchange": "stats", "size": 41 if last else 37},
        "student vocabulary, weight": {"exchange": "weight", "size": 41 if last else 37},
        "metrics": {"exchange": "stats", "metrics": not last},
        "loss_memory_mb": {"exchange": "stats", "chunk_size": "auto", "loss_memory_mb": 1.0 if last else 2.0},
        "student width": {"exchange": "stats", "widths": (32 if last else 16, 24)},
        "teacher width": {"exchange": "stats", "widths": (16, 32 if last else 24)},
        "teacher vocabulary, stats": {"exchange": "stats", "teacher_size": 41 if last else 37},
        "teacher vocabulary, weight": {"exchange": "weight", "teacher_size": 41 if last else 37},
        "dtype": {"exchange": "stats", "dtype": torch.float64 if last else torch.float32},
    }
    return {(name, unit): _refused(unit, **plant) for unit in UNITS for name, plant in plants.items()}


def _refused(
    unit: str,
    *,
    size: int = 37,
    teacher_size: int = 37,
    widths: tuple[int, int] = (16, 24),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[str, float]:
    """What the first step says, and after how many seconds."""
    student, teacher = (
        make_model("llama", width, vocab_size, seed=0).to(dtype)
        for width, vocab_size in zip(widths, (size, teacher_size), strict=True)
    )
    kd.attach(student, teacher, make_config(**settings))
    if unit == "head":
        shard_head(student)
        shard_head(teacher)
    elif unit == "fsdp2 root":
        fully_shard(student)
    else:
        student = FullyShardedDataParallel(student, use_orig_params=True, device_id=torch.device("cpu"))
    start = time.perf_counter()
    try:
        step(student, torch.full((1, 6), 3))
        message = "accepted"
    except ValueError as error:
        message = str(error)
    seconds = time.perf_counter() - start
    dist.barrier()
    return message, seconds


def hooks(rank: int) -> dict[str, int]:
    """By wrapper: global hooks of `attach` that are left after a first step, which follows one rank's own forward."""
    everywhere, found = torch.nn.modules.module._global_forward_pre_hooks, {}
    for name in ("ddp", "copies", "fsdp2 root"):
        before = set(everywhere)
        student, teacher = (make_model("llama", STUDENT_WIDTH, 37, seed=i) for i in range(2))
        plugin = kd.attach(student, teacher, make_config("weight"))
        model = student
        if name == "ddp":
            model = DistributedDataParallel(student)
        elif name == "copies":  # FSDP2 units that gather nothing
            mesh = fsdp_units.make_mesh("cpu", dist.get_world_size(), replicate=True)
            fsdp_units.shard_student(student, mesh, dtype=torch.float32)
        else:
            fully_shard(student)
        if rank == 0 and name != "fsdp2 root":
            with torch.no_grad():
                student(torch.full((1, 6), 3))
        dist.barrier()  # fails if rank 0 is in another collective
        step(model, torch.full((1, 6), 3))
        found[name] = len(set(everywhere) - before)
        plugin.detach()
    return found


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Write FOLDER/<name>.pt for the functions that `spec` names."""
    save_probes(folder, [globals()[name] for name in spec], rank)
