"""Run several trainings under one launcher and write their results: `train_worker.py FOLDER SPEC.json`.

SPEC is a list of {"name", "sections", "keep"}: `sections` are merged over tests.tiny.run_config, and after a
run with "keep" all checkpoints but that step's are removed, as if the run had been killed there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

import kd_plugin as kd
from kd_plugin.engines.process_group import start_process_group
from tests.tiny import run_config


def main(folder: Path, spec: Path) -> None:
    place = start_process_group(60)
    results = {}
    for run in json.loads(spec.read_text()):
        result = kd.train(run_config(folder, run.get("output", run["name"]), **run["sections"]))
        results[run["name"]] = {
            "history": result.history,
            "before": result.before,
            "after": result.after,
            "export": str(result.export_dir),
        }
        if place.rank == 0 and "keep" in run:
            for path in result.output_dir.glob("checkpoints/step_*"):
                if int(path.name.removeprefix("step_")) != run["keep"]:
                    shutil.rmtree(path)
        dist.barrier()
    (folder / f"results_{place.rank}.json").write_text(json.dumps(results))
    place.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
