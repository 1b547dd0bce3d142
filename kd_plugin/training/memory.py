"""Memory of this process: its peak, what a piece of work takes, and what is free.

Notable decisions:
- on a GPU they are the allocator's figures; on a CPU, where freed memory may stay with the process, what the process
  holds beyond its parameters at most stands for what a piece of work takes: too much rather than too little;
- a tenth of all memory is never counted as free: fragmentation, communication buffers and others need it;
- ranks of one machine share its free memory evenly, and a container's limit counts like the machine's.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from kd_plugin.loss import device_speed
from kd_plugin.settings.units import GIB

_SPARE = 0.1  # of all memory
_GROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "sys/fs/cgroup/memory/memory.stat",
    ),
)
# Peaks of a GPU before they were reset, which belong to the run as well
_before = {"allocated": 0, "reserved": 0}


def memory_readings() -> dict[str, float]:
    """Peak memory of this process in GiB: what the CUDA allocator handed out and reserved, or resident memory."""
    if not torch.cuda.is_available():
        return {"peak_rss_gib": _peak_resident() / GIB}
    _note_peaks()
    return {f"peak_{name}_gib": num_bytes / GIB for name, num_bytes in _before.items()}


def peak_above_now() -> int:
    """Bytes by which this process has held more at its peak than it does now."""
    if torch.cuda.is_available():
        _note_peaks()
        return _before["allocated"] - torch.cuda.memory_allocated()
    return max(0, _peak_resident() - _resident())


class Taken:
    """What a piece of work takes."""

    num_bytes = 0
    """Bytes above what was held before, at its peak; an upper bound."""


@contextmanager
def measured(parameter_bytes: int) -> Iterator[Taken]:
    """Measure what the body takes; the process is known to hold `parameter_bytes` before."""
    taken = Taken()
    if not torch.cuda.is_available():
        yield taken
        taken.num_bytes = _peak_resident() - parameter_bytes
        return
    _note_peaks()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield taken
    taken.num_bytes = torch.cuda.max_memory_allocated() - before
    _note_peaks()


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still take, with some to spare; 0 where the system does not say.

    `root` is where the system describes itself (/proc, /sys).
    """
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        return max(0, int(device_speed.free_bytes() - _SPARE * total))
    sizes = [size for size in (_of_machine(root), *(_of_container(root, *names) for names in _GROUPS)) if size]
    # DeepSpeed's launcher does not count the ranks of a machine: then all of them may be here
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or (dist.get_world_size() if dist.is_initialized() else 1))
    return max(0, int(min((free - _SPARE * total for free, total in sizes), default=0) / ranks))


def _of_machine(root: Path) -> tuple[int, int] | None:
    """Bytes that are free, and all; None where the system does not say."""
    path = root / "proc/meminfo"
    if not path.exists():
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in _split(path, ":")}
    return (sizes["MemAvailable"], sizes["MemTotal"]) if "MemAvailable" in sizes else None


def _of_container(root: Path, limit: str, current: str, statistics: str) -> tuple[int, int] | None:
    """Bytes that are free below a control group's limit, and the limit; None without one. File cache is free."""
    if not (root / limit).exists() or not (root / current).exists():
        return None
    text = (root / limit).read_text().strip()
    if text == "max":
        return None
    cache = dict((name, int(size)) for name, _, size in _split(root / statistics, " ")) if statistics else {}
    return int(text) - int((root / current).read_text()) + cache.get("inactive_file", 0), int(text)


def _split(path: Path, separator: str) -> list[tuple[str, str, str]]:
    return [line.partition(separator) for line in path.read_text().splitlines()] if path.exists() else []


def _resident() -> int:
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _note_peaks() -> None:
    _before["allocated"] = max(_before["allocated"], torch.cuda.max_memory_allocated())
    _before["reserved"] = max(_before["reserved"], torch.cuda.max_memory_reserved())
