"""Sums kept on the device, one collective and one transfer per log step; wall time of named regions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.collectives import all_reduce

GIB = 2**30
_WITHOUT_FP64 = ("mps",)


class MetricSums:
    """Adds device vectors; reads them back, over all ranks, only when asked."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """`values` `[len(names)]`; kept in fp64 where the device has it, so that long sums stay exact."""
        values = _widened(values.detach())
        self._total = values.clone() if self._total is None else self._total + values

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is added in the body is forgotten afterwards."""
        before = self._total
        try:
            yield
        finally:
            self._total = before

    def take(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        largest: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Sums over all ranks since the last call, then zero. One all-reduce: call it on every rank.

        Of `largest`, numbers of this rank's host, the result has the maximum over all ranks.
        """
        total = self._total if self._total is not None else _widened(torch.zeros(len(self.names), device=device))
        self._total = None
        own, ranks, names = list((largest or {}).values()), num_ranks(group), len(self.names)
        # Each rank has columns of its own, so that their sum is everyone's numbers: a maximum in the same collective
        columns = torch.zeros(len(own), ranks, dtype=total.dtype, device="cpu")
        columns[:, dist.get_rank(group) if ranks > 1 else 0] = torch.tensor(own, dtype=total.dtype, device="cpu")
        total = torch.cat([total, columns.flatten().to(total.device)])
        if ranks > 1:
            all_reduce(total, group, "metrics")
        sums, everyone = total[:names].tolist(), total[names:].view(len(own), ranks).tolist()
        found = dict(zip(self.names, sums, strict=True))
        return found | {name: max(values) for name, values in zip(largest or {}, everyone, strict=True)}


def _widened(values: Tensor) -> Tensor:
    return values if values.device.type in _WITHOUT_FP64 else values.double()


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of `group` (default: all); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class Stopwatch:
    """Milliseconds spent in named regions; CUDA events on a GPU, so that measuring never waits for it.

    Only regions that the GPU has not finished hold events, so nothing piles up where nobody calls `take`.
    """

    def __init__(self) -> None:
        self._elapsed: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def region(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the body. Regions may nest; a nested one counts in both."""
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
            self._fold_finished()
        else:
            begin = time.perf_counter()
            yield
            self._add(name, (time.perf_counter() - begin) * 1e3)

    def _fold_finished(self) -> None:
        """Turn the oldest events into milliseconds, as far as the GPU is done with them."""
        while self._events and self._events[0][2].query():
            name, start, stop = self._events.pop(0)
            self._add(name, start.elapsed_time(stop))

    def _add(self, name: str, milliseconds: float) -> None:
        self._elapsed[name] = self._elapsed.get(name, 0.0) + milliseconds

    def take(self) -> dict[str, float]:
        """Milliseconds per region since the last call; waits for the GPU."""
        for name, start, stop in self._events:
            stop.synchronize()
            self._add(name, start.elapsed_time(stop))
        elapsed, self._elapsed, self._events = self._elapsed, {}, []
        return elapsed


def memory_readings() -> dict[str, float]:
    """Peak memory of this process in GiB: what the CUDA allocator handed out and reserved, or resident memory."""
    if torch.cuda.is_available():
        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes
    return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
