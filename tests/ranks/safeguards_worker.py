"""Two ranks that are not alike, and students that break on one of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import kd_plugin as kd
from kd_plugin.distributed.layout import values_here
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.engines.zero import DeepSpeedEngine
from kd_plugin.loss import processor
from kd_plugin.training import checkpoint, finite
from tests.ranks.attach_cases import make_model
from tests.ranks.worker import save_of_all_ranks
from tests.tiny_runs import run_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"train": {"parallel": "fsdp"}},
    "fsdp1": {"train": {"parallel": "fsdp1"}},
    "zero1": {"train": {"parallel": "deepspeed"}, "deepspeed": {"zero_optimization": {"stage": 1}}},
    "zero3": {"train": {"parallel": "deepspeed"}, "deepspeed": {"zero_optimization": {"stage": 3}}},
}
BROKEN_AFTER, SAVE_EVERY = 3, 2


def ended(call: Any) -> dict[str, Any]:
    """How `call` ends."""
    try:
        result = call()
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error), "result": None}
    return {"kind": "", "message": "", "result": result}


@contextmanager
def breaking(rank: int, seen: list[bool]) -> Iterator[None]:
    """The second rank's part of the student breaks after a step; `seen` is what ranks then think of their weights."""
    originals = {kind: kind.step for kind in (FsdpEngine, DeepSpeedEngine)}
    taken: list[int] = []

    def step(engine: Any, learning_rate: float) -> Any:
        norm = originals[FsdpEngine if isinstance(engine, FsdpEngine) else DeepSpeedEngine](engine, learning_rate)
        taken.append(1)
        if len(taken) == BROKEN_AFTER:
            seen.append(finite.has_finite_parameters(engine.student))
            if rank == 1:
                parts = [part for p in engine.student.parameters() if (part := values_here(p)).numel()]
                parts[len(parts) // 2].fill_(math.nan)
            seen.append(finite.has_finite_parameters(engine.student))
        return norm

    with patch.object(FsdpEngine, "step", step), patch.object(DeepSpeedEngine, "step", step):
        yield


def breaks(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """A run in which only the second rank's weights break."""
    sections = dict(LAYOUTS[name])
    sections["train"] = {**sections["train"], "max_steps": 9, "save_every": SAVE_EVERY, "keep_checkpoints": 1}
    sections["log"] = {"output_dir": str(folder / name), "tensorboard": False, "every": 100}
    seen: list[bool] = []
    with breaking(rank, seen):
        ending = ended(lambda: kd.train(run_config(folder, name, **sections)))
    left = [path.name for path in checkpoint.checkpoints(folder / name)]
    return {**ending, "result": None, "seen": seen, "left": left}


def resumes(folder: Path, rank: int, hidden_on: int) -> dict[str, Any]:
    """The newest of two checkpoints is not there on one of the ranks."""
    name = f"resumed_{hidden_on}"
    train = {"parallel": "fsdp", "max_steps": 2, "save_every": 1, "export": False}
    kd.train(run_config(folder, name, train=train))
    original = checkpoint.checkpoints
    dist.barrier()
    if hidden_on == 0 and rank == 0:  # it is nowhere else, either: what rank 0 sees is what is continued from
        (folder / name / "checkpoints" / "step_00000002").rename(folder / name / "kept")
    dist.barrier()

    def checkpoints(output_dir: Path) -> list[Path]:
        folders = original(output_dir)
        if rank == hidden_on == 1:
            return folders[:-1]
        return [*folders, folders[-1].with_name("step_00000002")] if rank != hidden_on and hidden_on == 0 else folders

    with patch.object(checkpoint, "checkpoints", checkpoints):
        config = run_config(folder, name, train={**train, "max_steps": 3, "save_every": 0, "resume": True})
        ending = ended(lambda: [values["step"] for values in kd.train(config).history])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / name)
    return ending


IDS = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(rank: int, native: tuple[bool, bool]) -> tuple[bool, torch.Tensor]:
    """One step in bfloat16 on processors of which some multiply it; whether this rank did, and a gradient."""
    capabilities = {"avx512_bf16": native[rank]}
    with patch.object(torch.cpu, "get_capabilities", lambda: capabilities):
        student, teacher = (make_model("llama", width, 37, seed=width).bfloat16() for width in (16, 24))
        kd.attach(student, teacher, kd.DistillConfig(exchange="weight", chunk_size=5, row_kernel="eager"))
        student(IDS, labels=IDS).loss.backward()
        return processor.multiplies(torch.bfloat16), student.model.layers[0].mlp.up_proj.weight.grad.float()


def peaks(rank: int) -> dict[str, float]:
    """The second rank's batch is larger."""
    student, teacher = (make_model("llama", width, 37, seed=width) for width in (16, 24))
    config = kd.DistillConfig(exchange="weight", chunk_size=5, row_kernel="eager")
    plugin = kd.attach(student, teacher, config)
    ids = IDS if rank else IDS[:, :5]
    student(ids, labels=ids).loss.backward()
    alone = plugin._measures._peak_loss_bytes / 2**30
    measured = plugin.metrics()
    return {"alone": alone, "peak": measured["loss_peak_gib"], "avoided": measured["logits_avoided_gib"]}


def run(folder: Path, spec: None, rank: int) -> None:
    """Everything, one after the other; FOLDER/found.pt has all ranks' findings."""
    results: dict[str, Any] = {name: breaks(folder, name, rank) for name in LAYOUTS}
    results |= {f"resume_{hidden}": resumes(folder, rank, hidden) for hidden in (0, 1)}
    results |= {str(native): gradients(rank, native) for native in ((True, True), (True, False), (False, False))}
    results["peaks"] = peaks(rank)
    save_of_all_ranks(folder / "found.pt", results)
