"""What a teacher that runs ahead receives, and how many micro-batches the ranks agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import kd_plugin as kd
from benchmarks.received import Received
from kd_plugin.engines import fsdp1_units, fsdp_units, zero_block
from kd_plugin.training import memory
from tests.ranks.sharded_heads import STUDENT_WIDTH, TEACHER_WIDTH, make_config
from tests.ranks.worker import save_probes
from tests.tiny_models import make_model
from tests.tiny_runs import make_folder, run_config

VOCAB, MICRO_BATCHES = 61, 4


class _Layout:
    """An attached student with a teacher, of which both are cut by one wrapper."""

    def __init__(self, name: str, exchange: str) -> None:
        name, _, how = name.partition(" ")
        widths = enumerate((STUDENT_WIDTH, TEACHER_WIDTH))
        student, teacher = (make_model("llama", width=w, vocab_size=VOCAB, seed=i) for i, w in widths)
        student.float(), teacher.float()
        self.numel = sum(parameter.numel() for parameter in teacher.parameters())
        self.head = teacher.get_output_embeddings().weight.numel()
        student.get_output_embeddings().requires_grad_(how != "frozen")
        self.student_head = student.get_output_embeddings().weight.numel()
        self.plugin = kd.attach(student, teacher, make_config(exchange))
        self.student, self.plugin.teacher = _wrapped(name, student, teacher, prefetches=how == "prefetching")

    def step(self, batches: list[dict[str, Tensor]]) -> list[float]:
        losses = []
        for batch in batches:
            loss = self.student(**batch, num_items_in_batch=MICRO_BATCHES * 12).loss
            loss.backward() if not hasattr(self.student, "backward") else self.student.backward(loss)
            losses.append(float(loss.detach()))
        return losses


def _wrapped(name: str, student: Any, teacher: Any, *, prefetches: bool) -> tuple[Any, Any]:
    mesh, cpu = fsdp_units.make_mesh("cpu", dist.get_world_size()), torch.device("cpu")
    if name == "fsdp":
        fsdp_units.shard_student(student, mesh, dtype=torch.float32)
        fsdp_units.shard_teacher(teacher, mesh)
        return student, teacher
    if name == "fsdp1":
        wrapped = fsdp1_units.wrap_student(student, mesh, cpu, dtype=torch.float32)
        return wrapped, fsdp1_units.wrap_teacher(teacher, mesh, cpu)
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else small parameters are not cut
    if not prefetches:  # what the first forward used, whether or not the next does: the head
        zero["stage3_prefetch_bucket_size"] = 0
    block: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    block |= {"zero_allow_untested_optimizer": True, "gradient_accumulation_steps": MICRO_BATCHES}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    wrapped, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=block)
    frozen = zero_block.teacher_config(block, precision="float32")
    return wrapped, deepspeed.initialize(model=teacher, config=frozen)[0]


def _batches(rank: int, step: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(3, VOCAB, (MICRO_BATCHES, 2, 6), generator=generator)
    return [{"input_ids": each, "shift_labels": each.clone()} for each in ids]


def _received(name: str, exchange: str, rank: int) -> dict[str, Any]:
    """Bytes of the teacher's forwards by their number a step, and of a whole step as the student and ahead."""
    layout = _Layout(name, exchange)
    found: dict[str, Any] = {"numel": layout.numel, "head": layout.head, "student head": layout.student_head}
    layout.step(_batches(rank, 0))  # settles the exchange, cuts the teacher's head
    for step, together in enumerate((1, 2, MICRO_BATCHES), start=1):
        batches = _batches(rank, step)
        with Received() as log:
            assert layout.plugin.teacher_ahead(batches, together)
        found[f"{MICRO_BATCHES // together} forwards"] = log.total
        with Received() as log:
            losses = layout.step(batches)
        found["student"] = log.total
    with Received() as log:
        found["same losses"] = layout.step(batches) == losses
    return found | {"as the student": log.total}


def gradients(rank: int) -> list[bool]:
    """Whether a step with a frozen head has the same gradients as the student and ahead, as this rank holds them."""
    layout, found = _Layout("fsdp frozen", "weight"), []
    layout.step(_batches(rank, 0))
    for ahead in (False, True):
        layout.student.zero_grad()
        batches = _batches(rank, 1)
        if ahead:
            assert layout.plugin.teacher_ahead(batches)
        layout.step(batches)
        found.append([p.grad.to_local().clone() for p in layout.student.parameters() if p.grad is not None])
    return [torch.equal(one, other) for one, other in zip(*found, strict=True)]


def received(rank: int) -> dict[str, dict[str, Any]]:
    """By wrapper and exchange."""
    cases = [(name, mode) for name in ("fsdp", "fsdp1") for mode in ("weight", "stats")] + [("fsdp frozen", "weight")]
    return {f"{name}, {mode}": _received(name, mode, rank) for name, mode in cases}


def received_zero3(rank: int) -> dict[str, dict[str, Any]]:
    """The same of two ZeRO-3 engines."""
    return {f"zero3, {mode}": _received("zero3", mode, rank) for mode in ("weight", "stats")}


def received_prefetching(rank: int) -> dict[str, dict[str, Any]]:
    """The same of ZeRO-3 engines that fetch ahead of use, as they do by default."""
    return {"zero3 prefetching, weight": _received("zero3 prefetching", "weight", rank)}


def agreed(rank: int, folder: Path) -> tuple[int | None, list[float]]:
    """What ranks settle of which the last has less memory than the others, and the losses of that run."""
    from kd_plugin.training import loop

    paces: list[Any] = []
    real = loop._train_step

    def watched(session: Any, step: int) -> Any:
        paces.append(session.pace)
        return real(session, step)

    last = rank == dist.get_world_size() - 1
    with (
        mock.patch.object(memory, "free_bytes", lambda: 2**40 if not last else 3 * 2**33),
        mock.patch.object(memory.Taken, "num_bytes", property(lambda _self: 2**33, lambda _self, _value: None)),
        mock.patch.object(memory, "peak_above_now", lambda: 0),
        mock.patch.object(loop, "_train_step", watched),
    ):
        train = {"parallel": "fsdp", "micro_batch_size": 1, "export": False, "max_steps": 3}
        result = kd.train(run_config(folder, "agreed", train=train))
    return paces[-1].together, [values["loss"] for values in result.history]


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Write FOLDER/<name>.pt for the functions that `spec` names."""

    def agreed_here(rank: int) -> Any:
        return agreed(rank, folder)

    agreed_here.__name__ = "agreed"
    probes = globals() | {"agreed": agreed_here}
    save_probes(folder, [probes[name] for name in spec], rank)


__all__ = ["MICRO_BATCHES", "make_folder", "run"]
