"""Starts the ranks of a benchmark: fresh processes under torchrun, which run `SCRIPT.py JOB.json LINES.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any


def launch(script: str, job: Any, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run `job`, a dataclass with `threads`, on `ranks` processes of this machine; returns the lines that they wrote.

    Raises:
        RuntimeError: a rank failed; with what was printed last.
    """
    job_file, lines_file = folder / "job.json", folder / "lines.json"
    job_file.write_text(json.dumps(asdict(job)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    here = Path(__file__).parent
    command = [sys.executable, *launcher, str(here / f"{script}.py"), str(job_file), str(lines_file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks failed: {done.stderr[-2000:]}")
    return json.loads(lines_file.read_text())


def run_rank(kind: Callable[..., Any], measure: Callable[[Any], list[dict[str, Any]]]) -> None:
    """What a worker's script does on each rank: `measure` the job, a `kind`; rank 0 writes the lines of it."""
    import torch
    import torch.distributed as dist

    from kd_plugin.distributed.collectives import end_process_groups

    job_file, lines_file = map(Path, sys.argv[1:])
    job = kind(**json.loads(job_file.read_text()))
    torch.set_num_threads(job.threads)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    lines = measure(job)
    if dist.get_rank() == 0:
        lines_file.write_text(json.dumps(lines))
    end_process_groups()
