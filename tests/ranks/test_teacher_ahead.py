"""A teacher that runs ahead over the micro-batches of a step: two ranks train as one process does without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.tiny_runs import curve, make_folder, run_config

MODES = ("weight", "logits", "stats")
DISTILL = {"row_kernel": "eager", "chunk_size": 48, "temperature": 2.0}


def run(layout: str, mode: str, together: int, *, teacher: dict[str, Any] | None = None) -> dict[str, Any]:
    """One entry of the worker's list: four micro-batches of one sequence on each rank."""
    zero = layout.startswith("zero")
    sections: dict[str, Any] = {
        "train": {"parallel": "deepspeed" if zero else layout, "micro_batch_size": 1, "export": False},
        "teacher": {"micro_batch_size": together, **(teacher or {})},
        "distill": {**DISTILL, "exchange": mode},
    }
    if zero:
        sections["deepspeed"] = {"zero_optimization": {"stage": int(layout[-1])}}
    name = "_".join([layout, mode, str(together), *(teacher or {})])
    return {"name": name, "sections": sections}


RUNS = {
    "quick": [
        *(run("fsdp", mode, 4) for mode in MODES),
        run("fsdp1", "weight", 4),
        *(run("zero3", mode, 4) for mode in ("weight", "stats")),
        run("fsdp", "weight", 2),
        run("ddp", "weight", 4),
        run("fsdp", "weight", 4, teacher={"sharding": "replicate"}),
    ],
    "slow": [
        *(run("fsdp1", mode, 4) for mode in ("logits", "stats")),
        run("zero3", "logits", 4),
        run("zero3", "weight", 3),  # of four micro-batches
        run("zero2", "stats", 4),
        run("fsdp", "stats", 4, teacher={"offload": True}),
    ],
}

LAUNCHES = {
    name: Launch(
        train_worker,
        ranks=2,
        spec=runs,
        prepare=make_folder,
        together="deepspeed" if name == "quick" else "",
        needs_deepspeed=True,
    )
    for name, runs in RUNS.items()
}
CASES = [
    pytest.param(launch, entry["name"], marks=[pytest.mark.slow] if launch == "slow" else [], id=entry["name"])
    for launch, runs in RUNS.items()
    for entry in runs
]


@pytest.fixture(scope="module")
def single(launched: Callable[[str], Launched]) -> TrainResult:
    """One process, whose teacher reads what its student reads."""
    folder = launched("quick").folder
    return kd.train(run_config(folder, "single", train={"parallel": "single", "micro_batch_size": 1, "export": False}))


@pytest.mark.parametrize(("launch", "name"), CASES)
def test_ranks_whose_teacher_runs_ahead_train_like_one_process_without(
    launched: Callable[[str], Launched], single: TrainResult, launch: str, name: str
) -> None:
    result = launched(launch).file("results.pt")[0][name]
    for number in ("loss", "soft_loss", "grad_norm", "top1_agreement", "valid_tokens"):
        assert curve(result, number) == pytest.approx(curve(single, number), rel=2e-5, abs=1e-6), number
    assert result["before"] == pytest.approx(single.before, rel=2e-5)
