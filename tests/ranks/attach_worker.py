"""Trains cases with the plugin attached: FOLDER/<case>.train.pt.

It also watches the collectives of a late step: FOLDER/<case>.watch.pt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines import fsdp_units, zero_block
from tests.ranks.attach_cases import (
    LEARNING_RATE,
    METRICS,
    STEPS,
    Case,
    Trained,
    items_of_step,
    make_batch,
    make_models,
)
from tests.ranks.collectives import Collective, CollectiveLog, local_shard


class TorchRun:
    """Plain PyTorch: one process, DDP or FSDP2."""

    def __init__(self, case: Case, student: nn.Module, teacher: nn.Module, plugin: kd.Plugin) -> None:
        self.module = self.model = student
        if case.wrapper == "ddp":
            self.model = DistributedDataParallel(student)
        elif case.wrapper in ("fsdp", "replicate"):
            mesh = fsdp_units.make_mesh("cpu", case.ranks, replicate=case.wrapper == "replicate")
            fsdp_units.shard_student(student, mesh, dtype=torch.float32)
        if case.wrapper != "single" and case.teacher == "shard" and case.loading != "teacher-first":
            fsdp_units.shard_teacher(teacher, fsdp_units.make_mesh("cpu", case.ranks, replicate=False))
        self.optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        # A counted loss is a mean per micro-batch; a given count leaves the averaging over ranks to be undone.
        self.factor = case.ranks if case.num_items == "given" else 1 / case.accumulation

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        (loss * self.factor).backward()

    def step(self) -> None:
        """After the last micro-batch."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name."""
        named = self.module.named_parameters()
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}

    def close(self) -> None:
        """Nothing to let go of."""


class DeepSpeedRun:
    """ZeRO: the student's engine, and one for a sharded teacher."""

    def __init__(self, case: Case, student: nn.Module, teacher: nn.Module, plugin: kd.Plugin) -> None:
        import deepspeed

        self.module, self.given, self.case = student, case.num_items == "given", case
        block: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1
            "zero_allow_untested_optimizer": True,
            # Without the threshold every parameter of a tiny model would be small enough to stay whole.
            "zero_optimization": {"stage": int(case.wrapper[-1]), "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        self.model, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=block)
        self.engines = [self.model]
        if case.teacher == "shard":
            block = zero_block.teacher_config(block, precision="float32")
            plugin.teacher, *_ = deepspeed.initialize(model=teacher, config=block)
            self.engines.append(plugin.teacher)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed divides by the accumulation steps unless told not to."""
        if self.given:
            self.model.backward(loss * self.case.ranks, scale_wrt_gas=False)
        else:
            self.model.backward(loss)
        self.model.step()  # does nothing before the last micro-batch

    def step(self) -> None:
        """Done by the last `backward`."""

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name."""
        import deepspeed

        found = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        return found

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        for engine in self.engines:
            engine.destroy()


def train(case: Case, rank: int) -> dict[str, Any]:
    """Run `case` on this rank; `Trained`'s fields, and the teacher's parameters left whole."""
    student, teacher = make_models(case.architecture)
    numel = [parameter.numel() for parameter in teacher.parameters()]
    _load(case, student, teacher)
    plugin = kd.attach(student, teacher, case.config)
    run = (DeepSpeedRun if case.wrapper.startswith("zero") else TorchRun)(case, student, teacher, plugin)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        extra = {"num_items_in_batch": items_of_step(case, step)} if case.num_items == "given" else {}
        for micro in range(case.accumulation):
            input_ids, labels = make_batch(step, micro, rank)
            loss = run.model(input_ids, labels=labels, **extra).loss
            total += loss.detach() / (1 if extra else case.ranks * case.accumulation)
            run.backward(loss)
        run.step()
        if case.ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    metrics = plugin.metrics()
    result = Trained(run.parameters(), losses, {name: metrics[name] for name in METRICS})._asdict()
    kept = zip(teacher.named_parameters(), numel, strict=True)
    result["whole_in_teacher"] = [name for (name, p), whole in kept if _numel_here(p) >= whole]
    run.close()
    return result


def _load(case: Case, student: nn.Module, teacher: nn.Module) -> None:
    """What has happened to the models before the user attaches."""
    if case.loading == "teacher-first":
        fsdp_units.shard_teacher(teacher, fsdp_units.make_mesh("cpu", case.ranks, replicate=False))
    elif case.loading == "zero.Init":
        import deepspeed

        block = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        for model in (student, teacher):
            deepspeed.zero.Init(module=model, config_dict_or_path=block)
            assert all(parameter.numel() == 0 for parameter in model.parameters())


def watch(case: Case, rank: int) -> list[Collective]:
    """The collectives of the third step, when every backend has settled.

    An embedding of its own is frozen, so that the one gradient of vocabulary size is the head's.
    """
    student, teacher = make_models(case.architecture)
    embedding = student.get_input_embeddings()
    embedding.requires_grad_(embedding.weight is student.get_output_embeddings().weight)
    plugin = kd.attach(student, teacher, case.config)
    run = (DeepSpeedRun if case.wrapper.startswith("zero") else TorchRun)(case, student, teacher, plugin)
    for step in range(STEPS):
        watched = {}
        if case.wrapper == "fsdp":
            heads = {"student head": student, "teacher head": teacher}
            watched = {name: local_shard(model.get_output_embeddings()) for name, model in heads.items()}
        input_ids, labels = make_batch(step, 0, rank)
        with CollectiveLog(watched) as log:
            log.phase = "forward"
            loss = run.model(input_ids, labels=labels).loss
            log.phase = "backward"
            run.backward(loss)
        run.step()
    run.close()
    return log.calls


def _numel_here(parameter: Tensor) -> int:
    """Elements of a parameter that this rank holds now."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    partition = getattr(parameter, "ds_tensor", None)
    return local.numel() + (0 if partition is None else partition.numel())


def gathered(result: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """`result` with the metrics of every rank in a list."""
    metrics: list[Any] = [None] * ranks
    dist.all_gather_object(metrics, result["metrics"])
    return {**result, "metrics_of_ranks": metrics}


def run(folder: Path, spec: dict[str, Any], rank: int) -> None:
    """Train and watch the cases of `spec`, writing each result when it is there."""
    for case in (Case(**fields) for fields in spec["watch"]):
        calls = watch(case, rank)
        if rank == 0:
            torch.save(calls, folder / f"{case.name}.watch.pt")
    for case in (Case(**fields) for fields in spec["train"]):
        result = gathered(train(case, rank), dist.get_world_size())
        if rank == 0:
            torch.save(result, folder / f"{case.name}.train.pt")
