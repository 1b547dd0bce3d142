"""What the parts of `gpu.py` share: their options, their results as they come, and the device's clock and memory."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


@dataclass
class Part:
    """One part's share of the time, and the file that its results go to."""

    device: str
    quick: bool
    seconds: float
    out: Path
    threads: int
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.begin)

    def emit(self, kind: str, **values: Any) -> None:
        """Append one result to `gpu.jsonl`, where it stays whatever happens to this process."""
        line = json.dumps({"kind": kind, **values})
        with (self.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def skip(self, what: str, reason: object) -> None:
        """Say by name what is not measured."""
        self.emit("skipped", what=what, reason=one_line(reason))


def one_line(reason: object) -> str:
    """An exception, or a text, in one line of at most 300 characters."""
    message = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason)
    return " ".join(message.split())[:300]


def part(description: str | None, argv: Sequence[str] | None = None) -> Part:
    """Read the command line that `gpu.py` calls its parts with; `--seconds` alone bounds nothing but what is begun."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    return Part(given.device, given.quick, given.seconds, given.out, given.threads)


def device_times(step: Callable[[], Any], device: str, *, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls of `step` in a row: by CUDA events, elsewhere by the host's clock."""
    if device == "cpu":
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
        return times
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin_event, end_event in events:
        begin_event.record()
        step()
        end_event.record()
    torch.cuda.synchronize()
    return [begin_event.elapsed_time(end_event) for begin_event, end_event in events]


def calls_within(milliseconds: Sequence[float], seconds: float, *, fewest: int = 3, most: int = 30) -> int:
    """How many calls of such lengths fit into `seconds`."""
    return max(fewest, min(most, int(seconds * 1e3 / max(statistics.median(milliseconds), 1e-3))))


def peak_gib(step: Callable[[], Any], device: str) -> float | None:
    """The most that `torch` allocates during `step` above what it held before; None where there is no such count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB
