"""Start a worker script on several CPU ranks and wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def launch(worker: Path, *arguments: str, ranks: int, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `worker *arguments` under torchrun on a free port. The caller looks at the return code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, *launcher, str(worker), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=REPOSITORY
    )


def launch_cases(worker: Path, folder: Path, cases: Any, *, ranks: int, timeout_s: float) -> str:
    """Write `cases` to `folder`/cases.json and run `worker folder`; returns what was printed if it failed, else ''.

    What the worker wrote before it failed still counts, so nothing is raised here.
    """
    (folder / "cases.json").write_text(json.dumps(cases, default=asdict))
    try:
        done = launch(worker, str(folder), ranks=ranks, timeout_s=timeout_s)
    except subprocess.TimeoutExpired as error:
        return str(error)
    return done.stdout[-3000:] + done.stderr[-6000:] if done.returncode else ""
