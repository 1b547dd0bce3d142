"""How fast a device multiplies and moves memory, and how much of that is free: what `chunk_size: auto` goes by."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from kd_plugin.loss.processor import HALVES
from kd_plugin.settings.device_peaks import Peaks, peaks_of

_REACHED = 0.8
"""The share of its peak that a large product reaches; copies reach nearly all of theirs."""
_ROUNDS = 5


class Speed(NamedTuple):
    """What a device reaches."""

    flops: float
    """FLOP/s of large products."""
    memory: float
    """Bytes/s of large copies, read and written together."""


@functools.cache
def speed_of(device: torch.device, dtype: torch.dtype) -> Speed:
    """How fast a GPU multiplies operands of `dtype`: by the table of peaks, or measured where that lacks it."""
    peaks = peaks_of(torch.cuda.get_device_name(device))
    if peaks is None:
        return measured_speed(device, dtype)
    return speed_by_peaks(peaks, dtype, tf32=bool(torch.backends.cuda.matmul.allow_tf32))


def speed_by_peaks(peaks: Peaks, dtype: torch.dtype, *, tf32: bool = False) -> Speed:
    """How fast a device of these `peaks` multiplies operands of `dtype`; `tf32`: fp32 ones may be rounded to that."""
    wide = peaks.tf32_flops if tf32 else peaks.fp32_flops
    return Speed(_REACHED * (peaks.half_flops if dtype in HALVES.values() else wide), peaks.memory)


def measured_speed(device: torch.device, dtype: torch.dtype, *, size: int = 4096) -> Speed:
    """How fast `device` multiplies two matrices `[size, size]` of `dtype`, and copies fp32; each the best of five."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(4 * size, size, device=device)
    product, copy = torch.empty_like(left), torch.empty_like(source)
    multiplying = _seconds(lambda: torch.mm(left, right, out=product), device)
    copying = _seconds(lambda: copy.copy_(source), device)
    return Speed(2 * size**3 / multiplying, 2 * source.nbytes / copying)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # loads kernels
    return min(once() for _ in range(_ROUNDS))


def free_bytes(device: torch.device | None = None) -> int:
    """Memory of a GPU that can still be allocated, with what torch holds and does not use; default: the current one."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
