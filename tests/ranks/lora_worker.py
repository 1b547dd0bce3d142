"""Trains students with adapters and the plugin attached: FOLDER/<case>.train.pt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kd_plugin as kd
from tests.ranks.exchange_cases import count_valid, make_batch
from tests.ranks.exchange_worker import EngineRun, WrappedRun
from tests.ranks.lora_cases import Case, make_models


def train(case: Case, rank: int) -> dict[str, Tensor]:
    """Parameters by name after `case`."""
    student, teacher = make_models(case)
    plugin = kd.attach(student, teacher, case.config)
    run = (EngineRun if case.wrapper.startswith("zero") else WrappedRun)(case, student, teacher, plugin)
    plugin.teacher = run.teacher
    for step in range(case.steps):
        input_ids, labels = make_batch(case, step, 0, rank)
        run.backward(run.model(input_ids, labels=labels, num_items_in_batch=count_valid(case, step)).loss)
        run.step()
    parameters = run.parameters()
    run.close()
    return parameters


def run(folder: Path, spec: dict[str, Any], rank: int) -> None:
    """Train the cases of `spec`, writing each result when it is there."""
    for case in (Case(**fields) for fields in spec["train"]):
        parameters = train(case, rank)
        if rank == 0:
            torch.save(parameters, folder / f"{case.name}.train.pt")
