"""Resumable checkpoints: written aside, renamed when complete, pruned by age.

Notable decisions:
- `step_00000040.partial` becomes `step_00000040` by one rename after every rank has written, so a killed save
  is never picked up; leftovers are removed by the next save;
- the engine writes model and optimizer in its own format (torch.distributed.checkpoint or DeepSpeed), this
  file adds the step, the configuration and each rank's random state;
- data order depends on seed and step alone, so there is no loader state to keep.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kd_plugin.config import RunConfig
from kd_plugin.engine import Engine

__all__ = ["CheckpointError", "checkpoints", "latest", "resume", "save"]

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_STATE = "engine"
_RUN = "run.json"
_SAME = ("student", "teacher", "distill", "data", "deepspeed")
"""Sections that make it another run when they change."""


class CheckpointError(ValueError):
    """A checkpoint cannot be continued from."""


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints below `output_dir`, oldest first."""
    found = output_dir.glob(f"checkpoints/step_*/{_RUN}")
    return sorted(path.parent for path in found if path.parent.name.removeprefix("step_").isdigit())


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(reversed(checkpoints(output_dir)), None)


def save(engine: Engine, config: RunConfig, *, mode: str, step: int) -> Path:
    """Write the checkpoint of `step`, remove those beyond `train.keep_checkpoints`. All ranks call this."""
    output_dir, rank = Path(config.log.output_dir), dist.get_rank()
    final = output_dir / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if rank == 0:
        for stale in [*final.parent.glob(f"*{_PARTIAL}"), final]:
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial / _STATE)
    torch.save(_random_state(), partial / f"random_{rank}.pt")
    dist.barrier()
    if rank == 0:
        run = {"step": step, "parallel": mode, "world_size": dist.get_world_size()}
        run["config"] = config.model_dump(mode="json")
        (partial / _RUN).write_text(json.dumps(run, indent=1))
        partial.rename(final)
        for old in checkpoints(output_dir)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def resume(engine: Engine, config: RunConfig, folder: Path, *, mode: str) -> int:
    """Load the checkpoint in `folder` into engine and process; returns its step. All ranks call this.

    Raises:
        CheckpointError: written by DeepSpeed and read by FSDP or the other way round, or by ZeRO on another number
            of ranks.
    """
    run = json.loads((folder / _RUN).read_text())
    _check(run, folder, mode)
    for section in _changed_sections(run["config"], config):
        logger.warning("resume: section %s differs from the one that wrote %s", section, folder)
    engine.load(folder / _STATE)
    mine = folder / f"random_{dist.get_rank()}.pt"
    if mine.is_file():
        _set_random_state(torch.load(mine, weights_only=True))
    else:
        logger.warning(
            "resume: %s has no random state for rank %d; dropout goes on differently", folder, dist.get_rank()
        )
    return run["step"]


def _check(run: dict[str, Any], folder: Path, mode: str) -> None:
    before, now = run["parallel"] == "deepspeed", mode == "deepspeed"
    if before != now:
        raise CheckpointError(
            f"{folder} was written by train.parallel {run['parallel']}, this run is {mode}: "
            "resume with the former, or start from the export (student.model)"
        )
    if now and run["world_size"] != dist.get_world_size():
        raise CheckpointError(
            f"{folder} was written by {run['world_size']} ranks, now there are {dist.get_world_size()}: "
            "DeepSpeed resumes on as many ranks only"
        )


def _changed_sections(before: dict[str, Any], config: RunConfig) -> list[str]:
    now = config.model_dump(mode="json")
    return [name for name in _SAME if before.get(name) != now[name]]


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss_next],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
