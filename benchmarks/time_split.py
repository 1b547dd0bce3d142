"""Where the time of one step goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear"),
    "copies and fills": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::zero_", "aten::fill_", "aten::cat"),
    "gather, scatter, index": ("aten::gather", "aten::scatter_add_", "aten::index", "aten::index_put_"),
}


def time_split(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds by kind of work in one call of `step`, from torch.profiler; CPU only."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        step()
        wall = (time.perf_counter() - begin) * 1e3
    split = dict.fromkeys([*_GROUPS, "row pass (compiled)"], 0.0)
    for event in profiler.key_averages():
        milliseconds = event.self_cpu_time_total / 1e3
        if "ompiled" in event.key:  # Torch-Compiled Region, CompiledFxGraph
            split["row pass (compiled)"] += milliseconds
        for group, names in _GROUPS.items():
            if event.key in names:
                split[group] += milliseconds
    split["everything else"] = max(0.0, wall - sum(split.values()))
    return split | {"whole step": wall}
