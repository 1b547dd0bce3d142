"""How long the exchanges take, and what of a slow network they hide."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import kd_plugin as kd
from kd_plugin.distributed.vocab_slice import VocabSlice, cut
from kd_plugin.exchange import row_gather, sharded_teachers
from kd_plugin.exchange.sharded_teachers import ShardedHeadTeacher
from kd_plugin.exchange.vocab_parallel import VocabParallelDistill
from kd_plugin.loss.chunk_loop import Problem
from kd_plugin.loss.from_hidden import loss_sums, make_problem
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher, TeacherSource
from tests.ranks.sharded_heads import make_student
from tests.ranks.worker import save_of_all_ranks

ROUNDS, ROWS, VOCAB, WIDTH = 5, 256, 16384, 576  # of the race; the ratio does not depend on V
CHUNK, CHUNKS, CHUNK_VOCAB, CHUNK_WIDTH = 96, 6, 16384, 128  # of the overlap


def race(rank: int) -> dict[str, list[float]]:
    """Seconds of a forward and backward through a pair of heads, by exchange, in turn."""
    input_ids = torch.randint(3, 61, (1, ROWS), generator=torch.Generator().manual_seed(rank))

    def step(student: Any) -> None:
        items = ROWS * dist.get_world_size()
        student(input_ids, shift_labels=input_ids, num_items_in_batch=items).loss.backward()
        student.zero_grad()

    seconds: dict[str, list[float]] = {"weight": [], "stats": []}
    students = {
        mode: make_student(kd.DistillConfig(exchange=mode), 61, (WIDTH, WIDTH), head_size=VOCAB)[0] for mode in seconds
    }
    for student in students.values():  # compiles, cuts the teacher's head
        step(student)
    for _ in range(ROUNDS):
        for mode, student in students.items():
            dist.barrier()
            begin = time.perf_counter()
            step(student)
            dist.barrier()
            seconds[mode].append(time.perf_counter() - begin)
    return seconds


class SlowNetwork:
    """A collective that arrives `delay` seconds after it was asked for; counts what its waits saw of that."""

    def __init__(self, delay: float) -> None:
        self.delay, self.asked, self.waited = delay, 0, 0.0

    def slow(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = collective(*args, **kwargs)
            pending = result[1] if isinstance(result, tuple) else result
            arrives, wait = time.perf_counter() + self.delay, pending.wait
            self.asked += 1

            def slow_wait() -> None:
                self.waited += max(arrives - time.perf_counter(), 0.0)  # the rest of the delay; later is no network's
                wait()
                time.sleep(max(arrives - time.perf_counter(), 0.0))

            pending.wait = slow_wait
            return result

        return call


class Heads:
    """A pair of heads cut over the ranks, and rows for `CHUNKS` chunks on this one."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(7)
        weight, self.teacher_weight = (torch.randn(CHUNK_VOCAB, CHUNK_WIDTH, generator=generator) for _ in range(2))
        self.weight = weight.requires_grad_(True)
        own = torch.Generator().manual_seed(rank)
        self.hidden, self.teacher_hidden = (torch.randn(CHUNK * CHUNKS, CHUNK_WIDTH, generator=own) for _ in range(2))
        self.targets = torch.randint(CHUNK_VOCAB, (CHUNK * CHUNKS,), generator=own)
        self.config = kd.DistillConfig(chunk_size=CHUNK, row_kernel="eager")
        self.vocab_slice: VocabSlice = cut(CHUNK_VOCAB, CHUNK_VOCAB, dist.group.WORLD)

    def _teacher_slice(self) -> HeadTeacher:
        return HeadTeacher(self.teacher_hidden, self.teacher_weight).vocab_slice(
            self.vocab_slice.start, self.vocab_slice.stop
        )

    def logits(self) -> Tensor:
        """The loss with the teacher's logits on the wire."""
        teacher = ShardedHeadTeacher(self._teacher_slice(), self.vocab_slice.teacher_bounds, self.vocab_slice.group)
        return loss_sums(self._problem(teacher), self.hidden, self.weight, None).loss_sum

    def stats(self) -> Tensor:
        """The loss with statistics on the wire."""
        weight = self.weight[self.vocab_slice.start : self.vocab_slice.stop]
        problem = self._problem(self._teacher_slice())
        return VocabParallelDistill.apply(self.hidden, weight, None, problem, self.vocab_slice, 1.0)[0]

    def _problem(self, teacher: TeacherSource) -> Problem:
        return make_problem(HeadCall(teacher, self.targets), self.config, self.hidden, CHUNK_VOCAB)


def overlap(rank: int) -> dict[str, dict[str, Any]]:
    """By exchange and collective: its delay, how often it was called, seconds of waiting that were left."""
    heads, found = Heads(rank), {}
    slowed = {"logits": (sharded_teachers, ("all_gather", "all_to_all")), "stats": (row_gather, ("all_gather",))}
    for mode, (module, names) in slowed.items():
        run = getattr(heads, mode)
        expected = float(run())
        begin = time.perf_counter()
        run()
        chunk = torch.tensor((time.perf_counter() - begin) / CHUNKS)
        dist.all_reduce(chunk, op=dist.ReduceOp.MIN)
        networks = {name: SlowNetwork(float(chunk) / 2) for name in names}
        calls = {name: network.slow(getattr(module, name)) for name, network in networks.items()}
        with mock.patch.multiple(module, **calls):
            assert float(run()) == expected
        found[mode] = {name: vars(network) for name, network in networks.items()}
    return found


def run(folder: Path, spec: None, rank: int) -> None:
    """Both measurements: FOLDER/found.pt has those of all ranks."""
    save_of_all_ranks(folder / "found.pt", {"race": race(rank), "overlap": overlap(rank)})
