"""Some of the ranks evaluate alone, between steps that all take.

Of four ranks they are one of two copies of an HSDP model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines import fsdp_units
from tests.ranks.attach_cases import make_models
from tests.ranks.worker import save_of_all_ranks

STEPS = 2
ALONE_S = 4  # how long the last cases wait
EXCHANGES = ("weight", "logits", "stats", "auto")
WRAPPERS = ("ddp", "replicate", "zero2")
CASES = [f"{wrapper} {exchange}" for wrapper in WRAPPERS for exchange in EXCHANGES]
TOGETHER = ["fsdp stats", "fsdp logits", "teacher-fsdp logits", "teacher-fsdp stats"]
OF_FOUR = ["hsdp stats", "hsdp logits"]
WAITING = ["fsdp", "zero3"]


def batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Ragged: the ranks have different numbers of valid tokens."""
    ids = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    labels = ids.clone()
    labels[0, : 2 + 3 * rank] = -100
    return {"input_ids": ids, "labels": labels}


def config_of(exchange: str) -> kd.DistillConfig:
    return kd.DistillConfig(exchange=exchange, chunk_size=5, row_kernel="eager", temperature=2.0)


def wrapped(name: str, student: nn.Module) -> tuple[Any, Callable[[torch.Tensor], None]]:
    """(what to call in training, its backward)."""
    if name == "ddp":
        return DistributedDataParallel(student), lambda loss: loss.backward()
    if name.startswith("zero"):
        import deepspeed

        block: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=block)
        return engine, engine.backward
    if name in ("replicate", "fsdp", "hsdp"):
        shard_size = 2 if name == "hsdp" else None
        mesh = fsdp_units.make_mesh("cpu", dist.get_world_size(), replicate=name == "replicate", shard_size=shard_size)
        fsdp_units.shard_student(student, mesh, dtype=torch.float32)
    return student, lambda loss: loss.backward()


def train_and_evaluate(name: str, exchange: str, rank: int, evaluates: tuple[int, ...]) -> dict[str, Any]:
    """Steps of both ranks, and before, between and after them evaluations by those in `evaluates`."""
    student, teacher = make_models("llama")
    if name == "teacher-fsdp":
        fsdp_units.shard_teacher(teacher, fsdp_units.make_mesh("cpu", 2))
    plugin = kd.attach(student, teacher, config_of(exchange))
    model, backward = wrapped(name, student)
    report: dict[str, Any] = {"trained": [], "evaluated": []}
    for step in range(STEPS + 1):
        if rank in evaluates:
            with torch.no_grad():
                report["evaluated"].append(float(student(**batch(rank, 100)).loss))
        if step < STEPS:
            loss = model(**batch(rank, step)).loss
            backward(loss)
            report["trained"].append(float(loss.detach()))
    report["mode"], report["metrics"] = plugin.exchange.mode, plugin.metrics()
    return report


def alone(name: str, rank: int) -> dict[str, Any]:
    """How an evaluation that needs the other rank ends: its wrapper gathers in hooks around the student's forward."""
    student, teacher = make_models("llama")
    kd.attach(student, teacher, config_of("weight"))
    wrapped(name, student)
    if rank == 1:
        time.sleep(2 * ALONE_S)
        return {}
    start = time.perf_counter()
    try:
        with torch.no_grad():
            student(**batch(rank, 100))
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error), "seconds": time.perf_counter() - start}
    return {"kind": "", "message": "", "seconds": time.perf_counter() - start}


def run(folder: Path, spec: dict[str, list[str]], rank: int) -> None:
    """Cases in which rank 0, or every rank, evaluates: FOLDER/reports.pt has all ranks' reports.

    A case that waits for a rank in vain comes alone: FOLDER/<case>.pt has the report of rank 0, and the ranks end here.
    """
    for name in spec.get("waiting", ()):
        report = alone(name, rank)
        if rank == 0:
            torch.save(report, folder / f"{name}.pt")
        os._exit(0)  # a group whose collective has failed is not taken down in order
    reports = {name: train_and_evaluate(*name.split(), rank, (0,)) for name in spec.get("rank 0", ())}
    reports |= {name: train_and_evaluate(*name.split(), rank, (0, 1)) for name in spec["ranks 0 and 1"]}
    save_of_all_ranks(folder / "reports.pt", reports)
