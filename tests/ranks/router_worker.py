"""Trains a mixture of experts with its router loss: FOLDER/<case>.train.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import kd_plugin as kd
from tests.experts import make_mixture
from tests.ranks.attach_cases import STEPS, Case, items_of_step, make_batch
from tests.ranks.attach_worker import DeepSpeedRun, TorchRun

MIXTURE = "Qwen3MoeForCausalLM"
CONFIG = kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, row_kernel="eager", chunk_size=5)


def train(case: Case, rank: int) -> dict[str, object]:
    """Three steps of SGD; in the second, rank 1 has no valid token."""
    student = make_mixture(MIXTURE)
    plugin = kd.attach(student, None, CONFIG)
    run = (DeepSpeedRun if case.wrapper.startswith("zero") else TorchRun)(case, student, student, plugin)
    router, losses = [], []
    for step in range(STEPS):
        extra = {"num_items_in_batch": items_of_step(case, step)} if case.num_items == "given" else {}
        for micro in range(case.accumulation):
            input_ids, labels = make_batch(step, micro, rank)
            run.backward(run.model(input_ids, labels=labels, **extra).loss)
        run.step()
        measured = plugin.metrics()
        router.append(measured["router_loss"])
        losses.append(measured["loss"])
    found = {"parameters": run.parameters(), "router": router, "losses": losses}
    run.close()
    return found


def run(folder: Path, spec: dict[str, Any], rank: int) -> None:
    """Train the cases of `spec`, writing each result when it is there."""
    for case in (Case(**fields) for fields in spec["train"]):
        found = train(case, rank)
        if rank == 0:
            torch.save(found, folder / f"{case.name}.train.pt")
