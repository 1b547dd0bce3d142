"""One of two ranks leaves the other alone, in several ways.

Every way has a process group of its own, because none can be used again once a collective in it has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import kd_plugin as kd
from kd_plugin.loss.chunk_plan import ChunkPlan
from tests.ranks.attach_cases import make_model
from tests.ranks.worker import save_of_all_ranks

TIMEOUT_S = 2
CHUNK_SIZE = 5
IDS = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(0))  # 16 rows count, in 4 chunks

Step = Callable[[], Any]


def prepare(exchange: str, group: Any) -> tuple[nn.Module, kd.Plugin]:
    """A student with its teacher, both whole on each rank."""
    student, teacher = (make_model("llama", width, 37, seed=width) for width in (16, 24))
    config = kd.DistillConfig(exchange=exchange, chunk_size=CHUNK_SIZE, row_kernel="eager")
    return student, kd.attach(student, teacher, config, group=group)


def one_step(student: nn.Module) -> None:
    """Without `num_items_in_batch`, so that `weight` has a collective of its own."""
    student(IDS, labels=IDS).loss.backward()


def ends_early(exchange: str, group: Any, rank: int) -> Step | None:
    """The first rank has one batch more than the second."""
    student, _ = prepare(exchange, group)
    one_step(student)
    return None if rank == 1 else lambda: one_step(student)


def asks_alone_for_metrics(exchange: str, group: Any, rank: int) -> Step | None:
    """As a rank does that logs inside `if rank == 0`."""
    student, plugin = prepare(exchange, group)
    one_step(student)
    return None if rank == 1 else plugin.metrics


def starts_alone(exchange: str, group: Any, rank: int) -> Step | None:
    """Not even the first step is everybody's."""
    student, _ = prepare(exchange, group)
    return None if rank == 1 else lambda: one_step(student)


def fails_amid_the_loss(exchange: str, group: Any, rank: int) -> Step:
    """The second rank has an error of its own amid the loss."""
    student, _ = prepare(exchange, group)
    one_step(student)
    original = ChunkPlan.at

    def planted(plan: ChunkPlan, index: int) -> Any:
        if rank == 1 and index == 2:
            raise ValueError("planted")
        return original(plan, index)

    def step() -> None:
        with patch.object(ChunkPlan, "at", planted):
            one_step(student)

    return step


def ends_early_under_fsdp(exchange: str, group: Any, rank: int) -> Step | None:
    """What waits is the wrapper's gather of the head, not a collective of the loss."""
    student, _ = prepare(exchange, group)
    mesh = DeviceMesh.from_group(group, "cpu")
    head = student.get_output_embeddings()
    fully_shard(head, mesh=mesh)
    fully_shard(student, mesh=mesh, ignored_params=set(student.parameters()) - set(head.parameters()))
    one_step(student)
    return None if rank == 1 else lambda: one_step(student)


WAYS: dict[str, tuple[Callable[[str, Any, int], Step | None], str]] = {
    **{f"ends early, {mode}": (ends_early, mode) for mode in ("weight", "logits", "stats")},
    "metrics": (asks_alone_for_metrics, "weight"),
    "first step": (starts_alone, "stats"),
    "fails, stats": (fails_amid_the_loss, "stats"),
    "fails, logits": (fails_amid_the_loss, "logits"),
    "ends early, fsdp": (ends_early_under_fsdp, "weight"),
}


def report(step: Step | None) -> dict[str, Any]:
    """How `step` ends."""
    start = time.perf_counter()
    try:
        if step is not None:
            step()
    except Exception as error:
        cause = error.__cause__
        kind, causes = type(error).__name__, "" if cause is None else f"{type(cause).__name__}: {cause}"
        return {"kind": kind, "message": str(error), "cause": causes, "seconds": time.perf_counter() - start}
    return {"kind": "", "message": "", "cause": "", "seconds": time.perf_counter() - start}


def run(folder: Path, spec: None, rank: int) -> None:
    """Go all ways, one after the other; FOLDER/alone.pt has all ranks' reports."""
    found = {}
    for name, (way, exchange) in WAYS.items():
        group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
        found[name] = report(way(exchange, group, rank))
        dist.barrier()
    save_of_all_ranks(folder / "alone.pt", found)
