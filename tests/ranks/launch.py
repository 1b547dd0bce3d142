"""Start a worker script on several CPU ranks and wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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


class Launches:
    """What the ranks of several launches wrote; each is started when a test first asks for one of its files.

    Args:
        worker: its module, which writes a file for each case into the folder that it is given.
        cases: name of a launch -> its cases, the first of which says how many ranks.
        new_folder: makes the folder of a launch.
        timeout_s: of each.
        spec: name of a launch -> what its worker reads; by default the cases.
    """

    def __init__(
        self,
        worker: ModuleType,
        cases: dict[str, list[Any]],
        new_folder: Callable[[str], Path],
        *,
        timeout_s: float,
        spec: Callable[[str], Any] | None = None,
    ) -> None:
        self._worker, self._cases, self._new_folder = Path(str(worker.__file__)), cases, new_folder
        self._timeout_s, self._spec = timeout_s, spec or cases.__getitem__
        self._started: dict[str, tuple[Path, str]] = {}

    def of(self, case: Any, kind: str = "pt") -> Any:
        """What was written about a case; one that finished before a crash still counts."""
        if case.wrapper.startswith("zero"):
            pytest.importorskip("deepspeed")
        name = next(name for name, cases in self._cases.items() if case in cases)
        return self.file(name, f"{case.name}.{kind}")

    def file(self, launch_name: str, name: str) -> Any:
        """What a launch wrote into a file."""
        if launch_name not in self._started:
            folder = self._new_folder(launch_name)
            ranks = self._cases[launch_name][0].ranks
            spec = self._spec(launch_name)
            failure = launch_cases(self._worker, folder, spec, ranks=ranks, timeout_s=self._timeout_s)
            self._started[launch_name] = folder, failure
        folder, failure = self._started[launch_name]
        assert (folder / name).exists(), f"the worker ended before {name}: {failure}"
        return torch.load(folder / name, weights_only=False)
