"""Resumable checkpoints: written aside, renamed when complete, pruned by age.

Notable decisions:
- `step_00000040.partial` becomes `step_00000040` by one rename after every rank has written, so a killed save
  is never picked up; leftovers are removed by the next save;
- the engine writes model and optimizer in its own format (torch.distributed.checkpoint or DeepSpeed), this
  file adds the step, the configuration and each rank's random state;
- data order depends on seed and step alone, so there is no loader state to keep;
- what decides the last bits (processor, row kernel, torch) is written down, and a difference at resuming is said;
- a checkpoint says that its weights are finite. One that is not is never continued from, also an old one without the
  mark, and pruning leaves the newest finite one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kd_plugin.distributed.collectives import all_gather_object
from kd_plugin.engines.optimizers import states_differ
from kd_plugin.engines.protocol import Engine
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.differences import changed_sections, numerics
from kd_plugin.training.finite import has_finite_parameters
from kd_plugin.training.random_state import random_state, set_random_state

__all__ = [
    "PARTIAL",
    "CheckpointError",
    "automatic_chunk",
    "checkpoints",
    "latest_finite",
    "resume",
    "save",
    "step_of",
    "to_continue",
    "written_aside",
]

logger = logging.getLogger(__name__)

_STEP = "step_"
PARTIAL = ".partial"
"""The end of a folder's name while it is written."""
_STATE = "engine"
_RUN = "run.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be continued from."""


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints below `output_dir`, oldest first."""
    runs = output_dir.glob(f"checkpoints/{_STEP}*/{_RUN}")
    return sorted(path.parent for path in runs if path.parent.name.removeprefix(_STEP).isdigit())


def step_of(folder: Path) -> int:
    """The step after which the complete checkpoint in `folder` was written."""
    return int(folder.name.removeprefix(_STEP))


def to_continue(config: RunConfig, world_size: int) -> Path | None:
    """The checkpoint that all ranks continue from, if there is one: the newest that rank 0 sees. One collective.

    Raises:
        CheckpointError: on all ranks, where one does not see that folder, or where checkpoints are in the way.
    """
    folder = Path(config.log.output_dir)
    names = [path.name for path in checkpoints(folder)]
    everyone = all_gather_object(names, None, "names of checkpoints") if world_size > 1 else [names]
    newest = folder / "checkpoints" / everyone[0][-1] if everyone[0] else None
    if config.train.resume:
        _check_is_shared(folder, newest, everyone)
        if newest is None:
            logger.info("train.resume: no checkpoint below %s, starting at step 1", folder)
        return newest
    if newest is not None and config.train.save_every:
        raise CheckpointError(
            f"log.output_dir {folder} holds checkpoints of another run ({newest.name}): "
            "set train.resume=true to continue it, or choose another log.output_dir"
        )
    return None


def _check_is_shared(folder: Path, newest: Path | None, everyone: list[list[str]]) -> None:
    """Refuse a `folder` in which a rank sees other checkpoints than rank 0; `everyone` has their names by rank."""
    others = [f"rank {rank} sees {seen[-1]}" for rank, seen in enumerate(everyone) if seen]
    if newest is None and others:
        raise CheckpointError(
            f"train.resume: rank 0 sees no checkpoint below {folder}, but {others[0]}: log.output_dir must be a folder "
            "that all machines share"
        )
    lacking = [rank for rank, seen in enumerate(everyone) if newest is not None and newest.name not in seen]
    if lacking:
        raise CheckpointError(
            f"train.resume: {newest}, the newest checkpoint that rank 0 sees, is not there on rank "
            f"{', '.join(map(str, lacking))}: log.output_dir must be a folder that all machines share"
        )


def latest_finite(output_dir: Path) -> Path | None:
    """The newest complete checkpoint that says that its weights are finite, if there is one."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if _is_finite(folder)), None)


def _is_finite(folder: Path) -> bool | None:
    """Whether a checkpoint says that its weights are finite; None for an old one, which says nothing."""
    return json.loads((folder / _RUN).read_text()).get("finite")


def together_in(folder: Path, config: RunConfig, world_size: int) -> int | None:
    """Micro-batches that the teacher read at once in the run that wrote `folder`; None where memory is to say.

    That is where it had not been settled, and where the micro-batches, the ranks or the device are others.
    """
    run = json.loads((folder / _RUN).read_text())
    same = run["world_size"] == world_size and run.get("numerics", {}).get("device") == numerics(config)["device"]
    before, now = run["config"], config.model_dump(mode="json")
    same = same and before["data"].get("seq_len") == now["data"]["seq_len"]
    sizes = ("micro_batch_size", "tokens_per_step", "gradient_accumulation_steps")
    same = same and all(before["train"].get(name) == now["train"][name] for name in sizes)
    return run.get("teacher_together") if same else None


def save(
    engine: Engine, config: RunConfig, *, mode: str, step: int, chunk_size: int, together: int | None = None
) -> Path:
    """Write the checkpoint of `step` and remove those beyond `train.keep_checkpoints`; returns its folder.

    All ranks call this. The caller has seen that the student is finite (`finite.has_finite_parameters`). `chunk_size`
    is what `distill.chunk_size` has come to, `together` the micro-batches that the teacher reads at once; None where
    that is not settled.
    """
    rank, final = dist.get_rank(), Path(config.log.output_dir) / "checkpoints" / f"{_STEP}{step:08d}"
    if rank == 0:
        for stale in final.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(stale, ignore_errors=True)
    run = {"step": step, "parallel": mode, "world_size": dist.get_world_size()}
    run |= {"finite": True, "chunk_size": chunk_size, "teacher_together": together, "numerics": numerics(config)}
    with written_aside(final, run | {"config": config.model_dump(mode="json")}) as partial:
        engine.save(partial / _STATE)
        torch.save(random_state(), partial / f"random_{rank}.pt")
    if rank == 0:
        _prune(config, final)
    dist.barrier()
    return final


@contextmanager
def written_aside(final: Path, run: dict[str, Any]) -> Iterator[Path]:
    """A folder for all ranks to write in, which becomes `final` after the body, with `run` in it, and not before."""
    partial = final.with_name(final.name + PARTIAL)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    yield partial
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / _RUN).write_text(json.dumps(run, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()


def _prune(config: RunConfig, newest: Path) -> None:
    for old in checkpoints(Path(config.log.output_dir))[: -config.train.keep_checkpoints]:
        if old != newest:  # which is finite; one of a later step may be older, and not
            shutil.rmtree(old)


def resume(engine: Engine, config: RunConfig, folder: Path, *, mode: str) -> dict[str, Any]:
    """Load the checkpoint in `folder` into engine and process; returns what else it says. All ranks call this.

    Raises:
        CheckpointError: written by DeepSpeed and read by FSDP or the other way round, or by ZeRO or with 8-bit states
            on another number of ranks; of a student with other adapters; or its weights are not finite.
    """
    run = json.loads((folder / _RUN).read_text())
    _check_backend(run, folder, mode)
    _check_adapters(run, folder, config)
    _check_states(run, folder, config)
    _warn_of_differences(run, folder, config)
    if not _loads_finite(engine, folder):
        raise CheckpointError(_refusal(engine, config, folder))
    mine = folder / f"random_{dist.get_rank()}.pt"
    if mine.is_file():
        set_random_state(torch.load(mine, weights_only=True))
    else:
        logger.warning(
            "resume: %s has no random state for rank %d; dropout goes on differently", folder, dist.get_rank()
        )
    return run


def automatic_chunk(run: dict[str, Any], config: RunConfig) -> int | None:
    """The rows per chunk that `distill.chunk_size: auto` came to in the `run` of a checkpoint.

    None where `config` leaves the chunks to other settings than that run, or the checkpoint is an old one.
    """
    names = ("chunk_size", "loss_memory_mb")
    before, now = run["config"].get("distill", {}), config.distill.model_dump(include=set(names))
    alike = now["chunk_size"] == "auto" and all(before.get(name) == now[name] for name in names)
    return run.get("chunk_size") if alike else None


def _warn_of_differences(run: dict[str, Any], folder: Path, config: RunConfig) -> None:
    for section, keys in changed_sections(run["config"], config).items():
        logger.warning("resume: section %s differs from the one that wrote %s (%s)", section, folder, keys)
    for name, now in numerics(config).items():
        before = run.get("numerics", {}).get(name, now)
        if before != now:
            logger.warning("resume: %s was %s, now it is %s: last bits may differ", name, before, now)


def _check_backend(run: dict[str, Any], folder: Path, mode: str) -> None:
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


def _check_adapters(run: dict[str, Any], folder: Path, config: RunConfig) -> None:
    """Refuse a student whose adapters are others than those in the checkpoint; their scale is no part of it."""
    before, now = run["config"]["student"], config.model_dump(mode="json")["student"]
    shape = ("lora.r", "lora.target_modules", "lora.modules_to_save", "freeze")
    for key in shape if before.get("lora") and now["lora"] else ("lora",):
        was, given = before, now
        for part in key.split("."):
            was, given = was.get(part), given.get(part)
        if was != given:
            raise CheckpointError(
                f"{folder} was written with student.{key} {json.dumps(was)}, now it is {json.dumps(given)}: set it "
                "back, or choose another log.output_dir"
            )


def _check_states(run: dict[str, Any], folder: Path, config: RunConfig) -> None:
    before = run["config"].get("train", {}).get("optimizer", "auto"), run["world_size"]
    if why := states_differ(before, (config.train.optimizer, dist.get_world_size())):
        raise CheckpointError(f"{folder} {why}: resume as it was, or start from the export (student.model)")


def _loads_finite(engine: Engine, folder: Path) -> bool:
    if _is_finite(folder) is False:
        return False
    engine.load(folder / _STATE)
    return has_finite_parameters(engine.student, engine.torch_optimizer)


def _refusal(engine: Engine, config: RunConfig, folder: Path) -> str:
    """The message that names the checkpoint to continue from instead; old ones that say nothing are tried."""
    everything = checkpoints(Path(config.log.output_dir))
    older = reversed([other for other in everything if other.name < folder.name])
    finite = next((other for other in older if _is_finite(other) or _loads_finite(engine, other)), None)
    cure = "no older one is finite: start anew in another log.output_dir, with a lower train.learning_rate"
    if finite is not None:
        cure = f"the newest finite one is {finite}: remove what is newer, and lower train.learning_rate"
    return f"{folder} holds weights that are NaN or infinite; {cure}"
