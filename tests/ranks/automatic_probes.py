"""Which mode `auto` takes in each layout of the models, and why. Every probe takes this process's rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines import fsdp1_units, fsdp_units, zero_block
from tests.ranks.attach_cases import make_model
from tests.ranks.sharded_heads import (
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    VOCAB_SIZE,
    make_config,
)
from tests.ranks.worker import save_probes

# More than pay for `stats` where the teacher's head need not be gathered, and as few as pay for its share alone
AUTO_ROWS = (120, 40)
FEWER_ROWS = ("student tied", "ddp", "zero3")
LAYOUTS = ("sharded", "replicated", "tied", "frozen", "groups", "student tied", "ddp", "fsdp1")


def automatic(rank: int) -> dict[str, list[str]]:
    """By layout: the mode that `auto` takes on this rank, and what rank 0 says about it."""
    return {name: _automatic(name) for name in LAYOUTS}


def automatic_zero3(rank: int) -> dict[str, list[str]]:
    """The same for two ZeRO-3 engines."""
    return {"zero3": _automatic("zero3")}


def outside_zero3(rank: int) -> str:
    """What the loss says of the weight of a ZeRO-3 engine's head, used past its forward."""
    student, teacher = (make_model("llama", STUDENT_WIDTH, VOCAB_SIZE, seed=i) for i in range(2))
    _wrapped("zero3", student, teacher)
    hidden, targets = torch.randn(5, STUDENT_WIDTH), torch.full((5,), 3)
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    try:
        kd.distill_loss(hidden, heads[0], hidden, heads[1], targets, config=make_config("weight"))
    except ValueError as error:
        return str(error)
    return "accepted"


def _automatic(name: str) -> list[str]:
    widths = enumerate((STUDENT_WIDTH, TEACHER_WIDTH))
    student, teacher = (make_model("llama", width, VOCAB_SIZE, seed=i) for i, width in widths)
    for side, model in (("tied", teacher), ("student tied", student)):
        if name == side:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    student.get_output_embeddings().requires_grad_(name != "frozen")
    plugin = kd.attach(student, teacher, make_config("auto"))
    model, plugin.teacher = _wrapped(name, student, teacher)
    log, handler = logging.getLogger("kd_plugin.exchange.mode"), Messages()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with torch.no_grad():  # an evaluation, of other sizes
        model(torch.full((1, 2), 3), shift_labels=torch.full((1, 2), 3), num_items_in_batch=1)
    assert plugin.exchange.mode is None
    input_ids = torch.full((2, AUTO_ROWS[name in FEWER_ROWS] // 2), 3)
    model(input_ids, shift_labels=input_ids, num_items_in_batch=input_ids.numel())
    log.removeHandler(handler)
    return [str(plugin.exchange.mode), *handler.found]


def _wrapped(name: str, student: nn.Module, teacher: nn.Module) -> tuple[Any, Any]:
    """What to call for each."""
    ranks = dist.get_world_size()
    mesh = fsdp_units.make_mesh("cpu", ranks, shard_size=2 if name == "groups" else ranks)
    if name == "zero3":
        import deepspeed

        block: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        block["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        engines = [deepspeed.initialize(model=student, optimizer=optimizer, config=block)[0]]
        engines.append(
            deepspeed.initialize(model=teacher, config=zero_block.teacher_config(block, precision="float32"))[0]
        )
        return tuple(engines)
    if name == "fsdp1":
        cpu = torch.device("cpu")
        wrapped = fsdp1_units.wrap_student(student, mesh, cpu, dtype=torch.float32)
        return wrapped, fsdp1_units.wrap_teacher(teacher, mesh, cpu)
    if name != "replicated":
        fsdp_units.shard_teacher(teacher, mesh)
    if name == "ddp":
        return DistributedDataParallel(student), teacher
    fsdp_units.shard_student(student, mesh, dtype=torch.float32)
    return student, teacher


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Write FOLDER/<name>.pt for the functions that `spec` names."""
    save_probes(folder, [globals()[name] for name in spec], rank)
