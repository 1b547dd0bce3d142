"""Start a worker script on several CPU ranks and wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
