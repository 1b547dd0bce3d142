"""Train the cases of FOLDER/cases.json with the plugin attached: `lora_worker.py FOLDER`.

Writes FOLDER/<case>.pt as it goes.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import kd_plugin as kd
from kd_plugin.distributed.collectives import end_process_groups
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


def main(folder: Path) -> None:
    """Train every case; what finished before a crash stays."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for case in (Case(**fields) for fields in json.loads((folder / "cases.json").read_text())):
        parameters = train(case, rank)
        if rank == 0:
            torch.save(parameters, folder / f"{case.name}.pt")
    end_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
