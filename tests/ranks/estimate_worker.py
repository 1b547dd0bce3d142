"""Measure one training step of tiny models under FSDP: `estimate_worker.py FOLDER CASE...`.

Writes FOLDER/measured_<ranks>.json: for each case, the bytes that rank 0 received in a step, and the peak of
its allocations above what it held before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kd_plugin as kd
from benchmarks.received import Received
from kd_plugin.distributed.collectives import end_process_groups
from kd_plugin.engines import fsdp1_units, fsdp_units
from kd_plugin.loss.buffers import release_workspace
from tests.allocations import allocator_record
from tests.ranks.estimate_cases import make_config, make_ids, make_models


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

    def step() -> None:
        student(input_ids=ids, labels=ids, num_items_in_batch=ids.numel()).loss.backward()

    step()  # compiles, makes the gradients, and agrees with the other ranks
    return step


def main(folder: Path, cases: list[str]) -> None:
    """Measure every case."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for case in cases:
        step = make_step(case, "eager")  # torch.compile refuses to run under a dispatch mode
        with Received() as received:
            step()
        step = make_step(case, "compile")
        release_workspace()
        _, peak = allocator_record(step)
        found[case] = {"received": received.by_operation, "peak": peak}
    if dist.get_rank() == 0:
        (folder / f"measured_{dist.get_world_size()}.json").write_text(json.dumps(found))
    end_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
