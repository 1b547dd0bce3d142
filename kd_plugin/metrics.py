"""Sums kept on the device, one collective and one transfer per log step; wall time of named regions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.collectives import all_reduce

GIB = 2**30


class MetricSums:
    """Adds device vectors; reads them back, over all ranks, only when asked."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """`values` `[len(names)]`; kept in fp64 where the device has it, so that long sums stay exact."""
        values = values.detach()
        if values.device.type != "mps":
            values = values.double()
        self._total = values.clone() if self._total is None else self._total + values

    def take(self, device: torch.device, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Sums over all ranks since the last call, then zero. One all-reduce: call it on every rank."""
        total = self._total if self._total is not None else torch.zeros(len(self.names), device=device).double()
        self._total = None
        if num_ranks(group) > 1:
            all_reduce(total, group, "metrics")
        return dict(zip(self.names, total.tolist(), strict=True))


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of `group` (default: all); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class Stopwatch:
    """Milliseconds spent in named regions; CUDA events on a GPU, so that measuring never waits for it."""

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
        else:
            begin = time.perf_counter()
            yield
            self._add(name, (time.perf_counter() - begin) * 1e3)

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
