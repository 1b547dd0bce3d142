"""Runs launches one after another on CPU ranks: `python -m tests.ranks.worker JOBS.json RANKS TIMEOUT_S`.

The ranks are forks of this process, so that what they import is imported once. JOBS is a list of {"worker", "folder",
"spec"}: each rank calls `run(folder, spec, rank)` of every worker's module.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from kd_plugin.distributed.collectives import end_process_groups


def save_of_all_ranks(path: Path, found: Any) -> None:
    """Write the list of every rank's `found`."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, found)
    if dist.get_rank() == 0:
        torch.save(results, path)


def save_probes(folder: Path, probes: list[Callable[[int], Any]], rank: int) -> None:
    """Write FOLDER/<probe>.pt for each: the list of every rank's result."""
    for probe in probes:
        save_of_all_ranks(folder / f"{probe.__name__}.pt", probe(rank))


def run_rank(rank: int, jobs: list[dict[str, Any]], ranks: int, port: int, timeout_s: float) -> None:
    """One rank's process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.stdout.reconfigure(line_buffering=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    for job in jobs:
        folder = Path(job["folder"])
        with (folder / "stdout.txt").open("a") as file:
            os.dup2(file.fileno(), 1)
        import_module(job["worker"]).run(folder, job["spec"], rank)
        dist.barrier()
    end_process_groups()


def main(jobs_file: str, ranks: int, timeout_s: float) -> None:
    """Fork the ranks; if one fails, the others are ended and its traceback is raised."""
    jobs = json.loads(Path(jobs_file).read_text())
    for job in jobs:
        import_module(job["worker"])
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    arguments = (jobs, ranks, port, timeout_s)
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
