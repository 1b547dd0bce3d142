"""Launches of several CPU ranks, each made once, when a test first asks for what its ranks wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of `worker.run(folder, spec, rank)` on each of `ranks` ranks, which writes files into the folder."""

    worker: ModuleType
    ranks: int
    spec: Any = None
    """What JSON can hold; a dataclass arrives as a dict of its fields."""
    prepare: Callable[[Path], object] | None = None
    """Writes what the ranks read from the folder, before they start."""
    together: str = ""
    """Launches of as many ranks with the same name here run one after another in the same processes: starting Python
    and its imports takes longer than most of them. With an empty name a launch has processes of its own."""
    needs_deepspeed: bool = False
    timeout_s: float = 300
    collectives_timeout_s: float = 60
    """Timeout of the process group that the ranks are in."""


@dataclass(frozen=True)
class Launched:
    """A launch that has ended, well or not; what its ranks wrote before a crash still counts."""

    folder: Path
    failure: str
    """What the ranks said if one of them failed, else empty."""

    def file(self, name: str) -> Any:
        """The content of a file that torch.save wrote."""
        path = self.folder / name
        assert path.exists(), f"the ranks ended before {name}: {self.failure}"
        return torch.load(path, weights_only=False)

    @property
    def printed(self) -> str:
        """What all ranks wrote to stdout."""
        return (self.folder / "stdout.txt").read_text()


class Launches:
    """All launches of one session of tests.

    Args:
        listed: those that the selected tests may ask for; others never share their processes.
        new_folder: makes an empty folder of a name like this.
    """

    def __init__(self, listed: Iterable[Launch], new_folder: Callable[[str], Path]) -> None:
        self._listed, self._new_folder = list(listed), new_folder
        self._launched: dict[Launch, Launched] = {}

    def __getitem__(self, launch: Launch) -> Launched:
        """The results of a launch, which is made now if it has not been yet, with those that share its processes."""
        if launch not in self._launched:
            shared = [other for other in self._listed if _share_processes(other, launch)]
            self._make(shared if launch in shared else [launch])
        return self._launched[launch]

    def _make(self, launches: list[Launch]) -> None:
        folders = [self._new_folder(launch.worker.__name__.rpartition(".")[2]) for launch in launches]
        for launch, folder in zip(launches, folders, strict=True):
            if launch.prepare is not None:
                launch.prepare(folder)
        failure = _run(launches, folders)
        self._launched |= {launch: Launched(folder, failure) for launch, folder in zip(launches, folders, strict=True)}

    @property
    def failures(self) -> list[str]:
        """What the ranks of failed launches said."""
        return sorted({launched.failure for launched in self._launched.values() if launched.failure})


def _share_processes(one: Launch, other: Launch) -> bool:
    if one.needs_deepspeed and importlib.util.find_spec("deepspeed") is None:
        return False
    return one.together == other.together != "" and one.ranks == other.ranks


def _run(launches: list[Launch], folders: list[Path]) -> str:
    """Run them in the same processes; returns what the ranks said if one of them failed, else an empty text."""
    jobs = [
        {"worker": launch.worker.__name__, "folder": str(folder), "spec": launch.spec}
        for launch, folder in zip(launches, folders, strict=True)
    ]
    path = folders[0] / "jobs.json"
    path.write_text(json.dumps(jobs, default=asdict))
    arguments = [str(path), str(launches[0].ranks), str(launches[0].collectives_timeout_s)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.ranks.worker", *arguments],
            env={**os.environ, **ENVIRONMENT},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=sum(launch.timeout_s for launch in launches),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return str(error)
    return done.stderr[-6000:] if done.returncode else ""
