"""What a computation allocates: every operator's new tensors, and the CPU allocator's own record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(values: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}


class NewTensors(TorchDispatchMode):
    """Shapes of all tensors that operators return in memory of their own; views and in-place results do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = _storages((args, kwargs))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                self.shapes.add(tuple(tensor.shape))
        return out

    @property
    def numels(self) -> dict[tuple[int, ...], int]:
        """Shape -> number of elements."""
        return {shape: torch.Size(shape).numel() for shape in self.shapes}


def allocator_record(work: Callable[[], object]) -> tuple[int, int]:
    """Run `work` -> (largest single allocation, peak above the start), in bytes, as the CPU allocator saw them.

    Sees what a dispatch mode cannot: memory taken inside compiled code and inside operators.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.empty(1)  # shows that allocations are recorded, should there be no other
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    held = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return largest, peak
