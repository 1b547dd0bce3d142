"""How fast this machine's processor does each kind of work, measured within about two seconds.

Notable decisions:
- every kind is timed as training runs it: layers by `nn.Linear`'s product in the models' dtype, heads by
  `loss.matmul`, attention by PyTorch's fused one, element by element on tensors as large as the models' hidden states;
- of several ranks as many measure at once as have cores, so that they share caches and memory as in a run. All ranks
  are taken to be on this machine;
- the median of several short rounds counts, and of one thread its processor time: what others take of the machine
  while this measures is no part of the answer, but that they crowd its caches is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin.estimate.setup import EstimateError, Setup
from kd_plugin.estimate.speeds import LayerSpeeds, Speeds, dtypes, row_sweeps
from kd_plugin.loss.matmul import Operand, Rounding, accumulate_outer, hidden_gradient, mm_into

__all__ = ["measured_speeds"]

_ROUNDS, _MOST_SECONDS = 9, 0.15  # of one kind of work
_ROWS, _WIDTH, _COLUMNS = 256, 1024, 2048  # at most: larger products are no faster
_TOKEN_IDS = 8192  # of a head, at most
_HEADS, _LENGTH = 4, 1024  # of attention, at most
_COPY = 2**24  # elements: 64 MiB, more than caches hold
_SENT = 2**20  # elements


class _Share(NamedTuple):
    """What of the machine one rank has."""

    threads: int
    at_once: int
    """Ranks that measure side by side."""
    crowding: float
    """Threads of all ranks for each core, 1 or more."""


def _share(world_size: int) -> _Share:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(torch.get_num_threads(), max(1, cores // world_size))
    return _Share(threads, max(1, min(world_size, cores // threads)), max(1.0, world_size * threads / cores))


def measured_speeds(setup: Setup) -> Speeds:
    """Measure this machine's processor for `setup`, with the threads that a rank of it has.

    Raises:
        EstimateError: several ranks, and gloo does not run here.
    """
    share, before = _share(setup.world_size), torch.get_num_threads()
    wire = _loopback(share.at_once) if setup.world_size > 1 else 0.0
    try:
        fresh = _fresh_copies(share)
        with ThreadPoolExecutor(share.at_once) as ranks:
            found = list(ranks.map(lambda _: _measured(setup, share), range(share.at_once)))
    finally:
        torch.set_num_threads(before)
    first = {name: sum(each[name] for each in found) / len(found) / share.crowding for name in found[0]}
    layers = {
        side: LayerSpeeds(*(first[f"{side} {kind}"] for kind in LayerSpeeds._fields)) for side in ("student", "teacher")
    }
    sorting = 1 / first["sorts"] if setup.sorts else 0.0
    return Speeds(
        **layers,
        student_logits=first["logits"],
        teacher_logits=first["logits"],
        hidden_gradient=first["hidden gradient"],
        head_gradient=first["head gradient"],
        memory=first["memory"],
        fresh=fresh,
        logit_seconds=row_sweeps(setup) / first["exponentials"] + sorting,
        wire=wire / share.crowding,
        operation_seconds=1 / first["operations"],
        is_asynchronous=False,
        how=_how(setup, share),
    )


def _how(setup: Setup, share: _Share) -> str:
    threads = f"{share.threads} thread{'s' if share.threads > 1 else ''}"
    text = f"measured now on this processor with {threads}"
    if setup.world_size == 1:
        return text
    crowded = "" if share.crowding == 1 else f", {share.crowding:.3g} threads for each core"
    return f"{text} a rank, all {setup.world_size} ranks taken to be on this machine{crowded}, gloo over its loopback"


def _measured(setup: Setup, share: _Share) -> dict[str, float]:
    """Units of work per second: FLOP, bytes, operations, logits."""
    torch.set_num_threads(share.threads)
    clock = _clock(share)
    with torch.no_grad():
        speeds = {"operations": _operations(clock), "memory": _copies(clock), **_rows(setup, clock)}
        for side, dtype in dtypes(setup).items():
            speeds |= {f"{side} {kind}": found for kind, found in _layers(setup, side, dtype, clock).items()}
        return speeds | _head(setup, clock)


def _per_second(amount: float, work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()  # loads kernels, touches memory
    taken, begin = [], time.perf_counter()
    while len(taken) < _ROUNDS and (len(taken) < 3 or time.perf_counter() - begin < _MOST_SECONDS):
        start = clock()
        work()
        taken.append(clock() - start)
    return amount / max(statistics.median(taken), 1e-9)


def _operations(clock: Callable[[], float]) -> float:
    """A chain of tiny modules: what Python and autograd take for an operation, whatever it computes."""
    chain, tiny = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))), torch.ones(1, 4)

    def forward() -> None:
        with torch.enable_grad():
            chain(tiny)

    return _per_second(len(chain), forward, clock)


def _copies(clock: Callable[[], float]) -> float:
    source = torch.ones(_COPY)
    copy = torch.empty_like(source)
    return _per_second(2 * source.nbytes, lambda: copy.copy_(source), clock)


def _fresh_copies(share: _Share) -> float:
    """By one rank alone: threads of one process would wait for each other where processes do not, to map memory."""
    torch.set_num_threads(share.threads)
    source = torch.ones(_COPY)
    return _per_second(2 * source.nbytes, source.clone, _clock(share)) / share.crowding


def _clock(share: _Share) -> Callable[[], float]:
    return time.thread_time if share.threads == 1 else time.perf_counter


def _rows(setup: Setup, clock: Callable[[], float]) -> dict[str, float]:
    """Exponentials, which the row pass is limited by where its blocks stay in the cache; sorting for uld."""
    logits = torch.linspace(-8, 0, 2**16).view(8, -1)
    out = torch.empty_like(logits)
    speeds = {"exponentials": _per_second(logits.numel(), lambda: torch.exp(logits, out=out), clock)}
    if setup.sorts:
        mixed = torch.randn(2, setup.student.vocab_size)
        speeds["sorts"] = _per_second(mixed.numel(), lambda: (mixed.sort(-1), mixed.argsort(-1)), clock)
    return speeds


def _layers(setup: Setup, side: str, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, float]:
    model = setup.student if side == "student" or setup.teacher is None else setup.teacher
    rows, width = min(setup.tokens, _ROWS), min(model.width, _WIDTH)
    columns = min(_COLUMNS, max(weight.rows for unit in model.units if unit.name == "layer" for weight in unit.weights))
    hidden, weight = torch.ones(rows, width, dtype=dtype), torch.ones(columns, width, dtype=dtype)
    states = torch.ones(setup.tokens, model.width, dtype=dtype)
    length = min(_LENGTH, setup.config.data.seq_len)
    heads = torch.ones(1, _HEADS, length, 64, dtype=dtype)
    scores = _HEADS * length * (length + 1) / 2
    return {
        "product": _per_second(2 * rows * width * columns, lambda: F.linear(hidden, weight), clock),
        "attention": _per_second(
            4 * scores * 64, lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True), clock
        ),
        "elementwise": _per_second(3 * states.nbytes, lambda: states * states, clock),
    }


def _head(setup: Setup, clock: Callable[[], float]) -> dict[str, float]:
    dtype, rows, width = dtypes(setup)["student"], min(setup.chunk, _ROWS), min(setup.student.width, _WIDTH)
    columns = min(_TOKEN_IDS, setup.student.vocab_size)
    hidden = torch.ones(rows, width, dtype=dtype)
    rounding = Rounding(result=setup.distill.logits_dtype == "input")
    operand = Operand("calibration", torch.ones(columns, width, dtype=dtype), torch.float32, rounding)
    logits, total = torch.ones(rows, columns), torch.zeros(columns, width)
    factor = operand.for_gradient
    narrow = logits.to(factor.dtype)

    def gradient_of_head() -> None:
        accumulate_outer(total, logits, None, hidden, first=True)

    flops = 2 * rows * width * columns
    return {
        "logits": _per_second(flops, lambda: mm_into(logits, hidden, operand), clock),
        "hidden gradient": _per_second(flops, lambda: hidden_gradient(narrow, factor), clock),
        "head gradient": _per_second(flops, gradient_of_head, clock),
    }


def _loopback(ranks: int) -> float:
    """Bytes/s that each of the ranks receives by gloo, one thread of this process for each.

    What crosses the loopback is copied by the processor, so its time is what the process spends.
    """
    ranks = max(2, ranks)
    if not dist.is_gloo_available():
        raise EstimateError(f"this build of torch has no gloo, which {ranks} ranks on CPUs need")
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def exchange(rank: int) -> float:
        group: Any = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60))
        own = torch.ones(_SENT)
        parts: list[Tensor] = [torch.empty_like(own) for _ in range(ranks)]

        def both() -> None:
            group.allgather([parts], [own]).wait()
            group.allreduce([own]).wait()

        received = (ranks - 1) * own.nbytes + 2 * (ranks - 1) / ranks * own.nbytes
        both()
        begin = time.process_time()
        for _ in range(_ROUNDS):
            both()
        return received * _ROUNDS * ranks / max(time.process_time() - begin, 1e-9)

    try:
        with ThreadPoolExecutor(ranks) as threads:
            return min(threads.map(exchange, range(ranks)))
    except RuntimeError as error:
        raise EstimateError(f"gloo does not run on this machine, and {ranks} ranks need it: {error}") from error
