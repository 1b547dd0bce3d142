"""Several runs of `kd.train` under one launch, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import launch


def launch_runs(folder: Path, runs: list[dict[str, Any]], *, ranks: int) -> str:
    """Do all `runs` (see `train_worker`) in one launch; returns what was printed."""
    spec = folder / "spec.json"
    spec.write_text(json.dumps(runs))
    done = launch(Path(train_worker.__file__), str(folder), str(spec), ranks=ranks, timeout_s=380)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def results_of(folder: Path, *, rank: int) -> dict[str, Any]:
    """Results by the runs' names, as `rank` saw them."""
    return json.loads((folder / f"results_{rank}.json").read_text())


def curve(result: dict[str, Any] | TrainResult, name: str = "loss") -> list[float]:
    """One number of every logged step."""
    history = result.history if isinstance(result, TrainResult) else result["history"]
    return [values[name] for values in history]
