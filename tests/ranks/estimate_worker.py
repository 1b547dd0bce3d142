"""Measures one training step of tiny models under FSDP: bytes received, and the peak above what was held before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import kd_plugin as kd
from benchmarks.received import Received
from kd_plugin.engines import fsdp1_units, fsdp_units
from kd_plugin.loss.buffers import release_workspace
from tests.allocations import allocator_record
from tests.ranks.estimate_cases import make_config, make_ids, make_models
from tests.ranks.worker import save_of_all_ranks


def make_step(case: str, row_kernel: str) -> Callable[[], None]:
    """One step of a sharded student with a sharded teacher, gradients accumulating."""
    ranks = dist.get_world_size()
    config = make_config(case, row_kernel=row_kernel)
    student, teacher = make_models()
    plugin = kd.attach(student, teacher, config.distill)
    mesh = fsdp_units.make_mesh("cpu", ranks, shard_size=config.train.shard_size)
    if config.train.parallel == "fsdp1":
        student = fsdp1_units.wrap_student(student, mesh, torch.device("cpu"), dtype=torch.float32)
        plugin.teacher = fsdp1_units.wrap_teacher(teacher, mesh, torch.device("cpu"))
    else:
        fsdp_units.shard_student(student, mesh, dtype=torch.float32)
        if ranks > 1:
            fsdp_units.shard_teacher(teacher, mesh)
    ids = make_ids(dist.get_rank())

    micro_batches = [{"input_ids": ids.clone(), "labels": ids} for _ in range(config.train.gradient_accumulation_steps)]

    def step() -> None:
        if len(micro_batches) > 1:
            plugin.teacher_ahead(micro_batches)
        for inputs in micro_batches:
            student(**inputs, num_items_in_batch=ids.numel()).loss.backward()

    step()  # compiles, makes the gradients, and agrees with the other ranks
    return step


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Measure every case: FOLDER/measured.pt has, from all ranks, the bytes received in a step and its peak."""
    found = {}
    for case in spec:
        step = make_step(case, "eager")  # torch.compile refuses to run under a dispatch mode
        with Received() as received:
            step()
        step = make_step(case, "compile")
        # What a collective has brought may be freed before or after the next arrives, hence the most of several steps.
        # Of several micro-batches the least: one's gradient may still be on its way in the next, which no estimate has.
        peaks = []
        for _ in range(5 if "+" in case else 3):
            release_workspace()
            peaks.append(allocator_record(step)[1])
        peak = min(peaks) if "+" in case else max(peaks)
        found[case] = {"received": received.by_operation, "peak": peak}
    save_of_all_ranks(folder / "measured.pt", found)
