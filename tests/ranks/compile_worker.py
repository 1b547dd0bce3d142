"""Runs of `kd.train` as in tests.ranks.train_worker, whose layers' graphs run as they were captured."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch._dynamo.utils import counters

from kd_plugin.distributed import compiler_internals
from tests.ranks import train_worker
from tests.ranks.worker import save_of_all_ranks


def run(folder: Path, spec: list[dict[str, Any]], rank: int) -> None:
    """Do the runs without the time that Inductor takes; FOLDER/graphs.pt says how many graphs each rank had."""
    inductor, before = compiler_internals.inductor, counters["stats"]["unique_graphs"]
    compiler_internals.inductor = lambda graph, inputs: graph.forward
    try:
        with warnings.catch_warnings():
            train_worker.run(folder, spec, rank)
    finally:
        compiler_internals.inductor = inductor
    save_of_all_ranks(folder / "graphs.pt", counters["stats"]["unique_graphs"] - before)
