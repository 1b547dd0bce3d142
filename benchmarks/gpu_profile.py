"""Part of `gpu.py`: where the device's time goes in one call of the loss, from torch.profiler.

A call is cut into the kernels' time by kind, and the gaps in which no kernel runs. The trace of the call is left in
`gpu_trace.json`, to be opened at https://ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cases import make_tensors
from contestants import CONTESTANTS
from gpu_part import Part, device_times, part
from gpu_points import OURS, QUICK_SHAPES, QUICK_TOKENS, SHAPES, TOKENS, shape_of
from time_split import time_split

KINDS = {  # the first one with a part of the kernel's name
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "gemv"),
    "row pass": ("triton_", "row_pass", "row_kernel"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "cast"),
    "gather, scatter, index": ("gather", "scatter", "index"),
}
OTHER = "other kernels"


class Kernel(NamedTuple):
    """One kernel, or copy, on the device; microseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """One of `KINDS`, or `OTHER`."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


def split(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds by kind; the gaps between kernels, and the whole call from the first kernel to the last."""
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    busy, reached = 0.0, ordered[0].start
    for kernel in ordered:
        found[kind_of(kernel.name)] += (kernel.end - kernel.start) / 1e3
        busy += max(0.0, kernel.end - max(reached, kernel.start))  # kernels may overlap
        reached = max(reached, kernel.end)
    whole = (reached - ordered[0].start) / 1e3
    return found | {"gaps": whole - busy / 1e3, "whole call": whole}


def profiled(step: Callable[[], Any], options: Part, trace: str | None) -> tuple[list[Kernel], list[Kernel]]:
    """One call under the profiler -> all kernels; the longest, added up by name (their start is 0)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(options.out / trace))
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation  # ranges of kernels
    ]
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.name] = totals.get(kernel.name, 0.0) + kernel.end - kernel.start
    longest = sorted(totals.items(), key=lambda pair: -pair[1])[:12]
    return kernels, [Kernel(name, 0.0, duration) for name, duration in longest]


def shares(times: dict[str, float], whole: str) -> dict[str, float]:
    """Each of `times` over that of the name `whole`."""
    return {name: milliseconds / times[whole] for name, milliseconds in times.items() if name != whole}


def measure(options: Part, kernels: Sequence[str]) -> None:
    """One call for each row kernel, which need not run here."""
    shapes, tokens = (QUICK_SHAPES, QUICK_TOKENS) if options.quick else (SHAPES, TOKENS)
    for kernel in kernels:
        dtype = "float32" if options.device == "cpu" else "bfloat16"
        case = replace(shapes[0], rows=tokens[-1], device=options.device, dtype=dtype, loss_memory_mb=None)
        case = replace(case, row_kernel=kernel)
        what = f"profile, row_kernel {kernel}"
        try:
            step = CONTESTANTS[OURS](case, make_tensors(case))
            unwatched = min(device_times(step, options.device, calls=3)[1:])
            if options.device == "cpu":
                times, longest, whole = time_split(step), [], "whole step"
            else:
                profiled(step, options, None)  # the first one starts the profiler
                found, longest = profiled(step, options, "gpu_trace.json" if kernel == kernels[0] else None)
                times, whole = split(found), "whole call"
        except Exception as error:
            options.skip(what, error)
            continue
        first = {"shape": shape_of(case), "tokens": case.rows, "row_kernel": kernel}
        options.emit("profile", key=what, **first, unwatched_ms=unwatched, ms=times, shares=shares(times, whole))
        for place in longest:
            name, kind = place.name[:100], kind_of(place.name)
            options.emit(
                "kernels", key=f"{kernel} {name}", row_kernel=kernel, kernel=name, counted_as=kind, ms=place.end / 1e3
            )


def main() -> int:
    """Run everything; returns the exit code."""
    options = part(__doc__)
    measure(options, ("eager",) if options.device == "cpu" else ("auto", "triton"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
