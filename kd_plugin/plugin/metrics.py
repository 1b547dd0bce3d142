"""What an attached student has measured since it was last asked.

Sums are kept on the device; one collective and one transfer read them. Wall times are of named regions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import all_reduce, num_ranks
from kd_plugin.divergences.objective import make_objective
from kd_plugin.loss.output import LossSums
from kd_plugin.row_kernels.statistics import STATISTICS
from kd_plugin.settings.run import DistillConfig
from kd_plugin.settings.units import GIB

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
        """Begin at zero in the body; what it adds is forgotten afterwards."""
        before, self._total = self._total, None
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

        The result also has, for each of the host's numbers in `largest`, the maximum over all ranks.
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
        totals = dict(zip(self.names, sums, strict=True))
        return totals | {name: max(values) for name, values in zip(largest or {}, everyone, strict=True)}


def _widened(values: Tensor) -> Tensor:
    return values if values.device.type in _WITHOUT_FP64 else values.double()


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

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Begin at zero in the body; its times are forgotten afterwards."""
        before = self._elapsed, self._events
        self._elapsed, self._events = {}, []
        try:
            yield
        finally:
            self._elapsed, self._events = before

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


class Measures:
    """Sums over valid rows, kept on the device; wall times; the most memory that a loss has held, all until asked."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._sums = MetricSums((*STATISTICS, "valid_tokens", "trained_tokens", "router_loss"))
        self._has_router_loss = self._splits = False
        self._peak_loss_bytes = 0
        self._dense_bytes = 0

    def add(self, sums: LossSums, router_loss: Tensor | None = None) -> None:
        """One forward, and the router loss (0-d) of its student."""
        valid = sums.num_valid.to(sums.statistics)
        router = torch.zeros_like(valid)
        if router_loss is not None:
            self._has_router_loss = True
            if sums.num_rows:  # it may be NaN where there is no token
                router = router_loss.detach().to(valid) * valid
        trained = valid if sums.num_hard is None else sums.num_hard.to(valid)
        self._splits = sums.num_hard is not None
        self._sums.add(torch.cat([sums.statistics, torch.stack([valid, trained, router])]))
        self._peak_loss_bytes = max(self._peak_loss_bytes, sums.workspace_bytes)
        self._dense_bytes = max(self._dense_bytes, sums.dense_bytes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Begin at zero in the body, whose measurements are its own and are forgotten afterwards."""
        peaks = self._peak_loss_bytes, self._dense_bytes
        self._peak_loss_bytes = self._dense_bytes = 0
        try:
            with self._sums.aside(), self.watch.aside():
                yield
        finally:
            self._peak_loss_bytes, self._dense_bytes = peaks

    def take(
        self, config: DistillConfig, device: torch.device, group: dist.ProcessGroup | None, chunk_size: int
    ) -> dict[str, float]:
        """What `Plugin.metrics` returns, for the objective of `config`; all numbers then start anew. One collective."""
        peaks = {"loss_peak_gib": self._peak_loss_bytes / GIB, "logits_avoided_gib": self._dense_bytes / GIB}
        self._peak_loss_bytes = self._dense_bytes = 0
        sums = self._sums.take(device, group, largest=peaks)
        peaks = {name: sums.pop(name) for name in peaks}
        counts = {name: sums.pop(name) for name in ("valid_tokens", "trained_tokens")}
        valid, trained = (max(count, 1.0) for count in counts.values())
        means = {name: value / (trained if name == "hard_loss" else valid) for name, value in sums.items()}
        kept = ("soft_loss", "hard_loss", *(["router_loss"] if self._has_router_loss else []))
        kept += make_objective(config).measured
        means = {name: means[name] for name in kept}
        loss = config.soft_weight * means["soft_loss"] + config.hard_weight * means["hard_loss"]
        loss += means.get("router_loss", 0.0)
        times = {f"{name}_ms": elapsed for name, elapsed in self.watch.take().items()}
        return {
            "loss": loss,
            **means,
            **(counts if self._splits else {"valid_tokens": counts["valid_tokens"]}),
            "temperature": config.temperature,
            "chunk_size": float(chunk_size),
            **peaks,
            **times,
        }
