"""Several runs of `kd.train`, one after another; FOLDER/results.pt has what each left behind, from all ranks.

The spec is a list of {"name", "sections"}: `sections` are merged over tests.tiny_runs.run_config. A run with "output"
writes into that folder instead of its name's, and after one with "keep" all checkpoints but that step's are removed, as
if it had been killed there. "{folder}" in a text stands for FOLDER.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

import kd_plugin as kd
from tests.ranks.worker import save_of_all_ranks
from tests.tiny_runs import run_config


def run(folder: Path, spec: list[dict[str, Any]], rank: int) -> None:
    """Do all runs in the folder that tests.tiny_runs.make_folder has filled."""
    results = {}
    for entry in json.loads(json.dumps(spec).replace("{folder}", str(folder))):
        result = kd.train(run_config(folder, entry.get("output", entry["name"]), **entry["sections"]))
        results[entry["name"]] = {
            "step": result.step,
            "history": result.history,
            "before": result.before,
            "after": result.after,
            "export": str(result.export_dir),
        }
        if rank == 0 and "keep" in entry:
            for path in result.output_dir.glob("checkpoints/step_*"):
                if int(path.name.removeprefix("step_")) != entry["keep"]:
                    shutil.rmtree(path)
        dist.barrier()
    save_of_all_ranks(folder / "results.pt", results)
