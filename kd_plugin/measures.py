"""What an attached student has measured since it was last asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kd_plugin import row_kernels
from kd_plugin.config import DistillConfig
from kd_plugin.fused_loss import LossSums
from kd_plugin.metrics import GIB, MetricSums, Stopwatch
from kd_plugin.objective import make_objective


class Measures:
    """Sums over valid rows, kept on the device; wall times; the most memory that a loss has held, all until asked."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._sums = MetricSums((*row_kernels.STATISTICS, "valid_tokens", "router_loss"))
        self._has_router_loss = False
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
        self._sums.add(torch.cat([sums.statistics, valid[None], router[None]]))
        self._peak_loss_bytes = max(self._peak_loss_bytes, sums.workspace_bytes)
        self._dense_bytes = max(self._dense_bytes, sums.dense_bytes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the body computes is not measured, but for its wall times."""
        peaks = self._peak_loss_bytes, self._dense_bytes
        try:
            with self._sums.aside():
                yield
        finally:
            self._peak_loss_bytes, self._dense_bytes = peaks

    def take(self, config: DistillConfig, device: torch.device, group: Any, chunk_size: int) -> dict[str, float]:
        """See `Plugin.metrics`, for the objective of `config`. One collective."""
        peaks = {"loss_peak_gib": self._peak_loss_bytes / GIB, "logits_avoided_gib": self._dense_bytes / GIB}
        self._peak_loss_bytes = self._dense_bytes = 0
        sums = self._sums.take(device, group, largest=peaks)
        peaks = {name: sums.pop(name) for name in peaks}
        valid = sums.pop("valid_tokens")
        means = {name: value / max(valid, 1.0) for name, value in sums.items()}
        kept = ("soft_loss", "hard_loss", *(["router_loss"] if self._has_router_loss else []))
        kept += make_objective(config).measured
        means = {name: means[name] for name in kept}
        loss = config.soft_weight * means["soft_loss"] + config.hard_weight * means["hard_loss"]
        loss += means.get("router_loss", 0.0)
        times = {f"{name}_ms": elapsed for name, elapsed in self.watch.take().items()}
        return {
            "loss": loss,
            **means,
            "valid_tokens": valid,
            "temperature": config.temperature,
            "chunk_size": float(chunk_size),
            **peaks,
            **times,
        }
