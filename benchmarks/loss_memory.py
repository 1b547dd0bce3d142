"""Peak memory of the loss and its gradients: `python benchmarks/loss_memory.py [--quick]`.

Every point is measured in a process of its own: compile on few rows, free everything, make the inputs, note the
memory, run one step, take the peak. What is reported is the peak minus that note minus the two gradients: what the
loss needs above its inputs and outputs. CPU: the kernel's peak of resident memory; CUDA: peak allocated.

On a CPU, every block of 64 KiB or more is a mapping of its own (glibc's MALLOC_MMAP_THRESHOLD_), which is given back
when it is freed: else the peak would depend on how the warm-up left the heap in pieces, by up to 60 MiB.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from cases import Case, make_tensors
from common import GIB, Options, Row, Target, figure, markdown, options, publish, write_csv
from contestants import CONTESTANTS
from race import Entry

MOST_BYTES = 16 * GIB
BUDGETS_MIB = (128.0, 512.0, 2048.0)
ROWS = (256, 1024, 2048, 8192, 32768)
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # read by glibc when a process starts
WARM_UP_ROWS = 128


def chunk_rows(case: Case) -> int:
    """Number of rows C of kd_plugin's full chunk."""
    from kd_plugin.loss.chunk_size import rows_per_chunk

    return case.chunk_size or rows_per_chunk("auto", case.loss_memory_mb, case.vocab)


def formula(case: Case) -> int:
    """Bytes that kd_plugin promises above inputs and outputs: 8 * C * V."""
    return 8 * min(chunk_rows(case), case.rows) * case.vocab


def least_dense(case: Case) -> int:
    """Bytes that the dense loss needs at least: both models' logits and the gradient of one, fp32."""
    return 3 * 4 * case.rows * case.vocab


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory can be measured on Linux only")


def _give_back() -> None:
    from kd_plugin.loss.buffers import release_workspace

    release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(name: str, case: Case) -> tuple[int, float]:
    """Measure the bytes of one step above its inputs and gradients, and its seconds, in a fresh process only."""
    import torch

    cuda = case.device != "cpu"
    for rows in (WARM_UP_ROWS, 2 * WARM_UP_ROWS):  # twice, so that torch.compile makes the row count dynamic
        small = replace(case, rows=min(rows, case.rows))
        CONTESTANTS[name](small, make_tensors(small))()
    _give_back()
    tensors = make_tensors(case)
    step = CONTESTANTS[name](case, tensors)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present
        before = _resident("VmRSS")
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in tensors[:2] if t.grad is not None)
    return peak - before - gradients, seconds


def _serve(pipe: Connection, name: str, case: Case, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        answer: Any = peak_bytes(name, case)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    pipe.send(answer)


def measure(entry: Entry, threads: int, seconds: float) -> tuple[int, float] | str:
    """Run `peak_bytes` in a fresh process; returns its result, or why there is none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, entry.contestant, entry.case, threads), daemon=True)
    with mock.patch.dict(os.environ, OWN_MAPPINGS):
        process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else f"not finished after {seconds:.0f} s"
    except EOFError:
        return "killed, most likely for its memory"
    finally:
        ours.close()
        process.join(20)  # torch.compile's helpers end with it, unless it hangs
        process.terminate()


class Plan:
    """All points to measure, in an order that gives every contestant its small ones first."""

    def __init__(self, run: Options, base: Case, rows: Sequence[int], budgets: Sequence[float]) -> None:
        self.run, self.begin = run, time.perf_counter()
        self.rate: dict[str, float] = {}  # seconds per row, of the largest point so far
        ours = [Entry(f"kd_plugin, {mib:g} MiB", "kd_plugin", replace(base, loss_memory_mb=mib)) for mib in budgets]
        ours = [ours[len(ours) // 2], *ours[: len(ours) // 2], *ours[len(ours) // 2 + 1 :]]  # the default first
        peers = [Entry(name, name, base) for name in ("compiled naive", "Liger", "TRL")]
        self.entries = [*ours, *peers]
        self.points = [e._replace(case=replace(e.case, rows=n)) for n in rows for e in self.entries]

    def rows(self) -> list[Row]:
        """Measure every point that fits memory and time; the CSV grows with them, for runs that are cut short."""
        table: list[Row] = []
        for entry in self.points:
            table.append(self._row(entry))
            write_csv(self.run, "loss_memory", table)
        return table

    def _row(self, entry: Entry) -> Row:
        case, ours = entry.case, entry.contestant == "kd_plugin"
        measured = self._refusal(entry) or measure(entry, self.run.threads, max(60.0, self._left()))
        row: dict[str, Any] = {"contestant": entry.label, "N": case.rows, "GiB": None, "8CV GiB": None, "note": ""}
        row["8CV GiB"] = formula(case) / GIB if ours else None
        row["C"] = chunk_rows(case) if ours else None
        row["seconds"] = None
        if isinstance(measured, str):
            row["note"] = measured
        else:
            num_bytes, row["seconds"] = measured
            row["GiB"] = num_bytes / GIB
            self.rate[entry.label] = row["seconds"] / case.rows
        print(f"  {entry.label}, N={case.rows}: {row['GiB'] if row['GiB'] is not None else row['note']}", flush=True)
        return row

    def _left(self) -> float:
        return self.run.minutes * 60 - (time.perf_counter() - self.begin)

    def _refusal(self, entry: Entry) -> str | None:
        case = entry.case
        if entry.contestant == "compiled naive" and least_dense(case) > MOST_BYTES:
            return f"skipped: needs over {least_dense(case) / GIB:.0f} GiB"
        expected = self.rate.get(entry.label, 0.0) * case.rows
        if expected > self._left():
            return f"skipped: would take about {expected:.0f} s of the {max(0.0, self._left()):.0f} s left"
        return None


def targets(rows: Sequence[Row]) -> list[Target]:
    """The targets, with what the points say."""
    measured = [row for row in rows if row["GiB"] is not None]
    ours = [row for row in measured if row["8CV GiB"] is not None]
    worst = max((row["GiB"] / row["8CV GiB"] for row in ours), default=None)
    judged = [Target("peak / 8CV, worst point of kd_plugin", 1.15, worst)]
    for label in dict.fromkeys(row["contestant"] for row in ours):
        by_rows = {row["N"]: row["GiB"] for row in ours if row["contestant"] == label}
        chunk = next(row["C"] for row in ours if row["contestant"] == label)
        full = [n for n in by_rows if n >= max(2048, chunk)]  # with fewer rows there is no full chunk
        growth = by_rows[max(full)] / by_rows[min(full)] if len(full) > 1 else None
        span = f"N={max(full)} / N={min(full)}" if len(full) > 1 else "N=32768 / N=2048"
        judged.append(Target(f"{label}: peak at {span}", 1.05, growth))
    for n in dict.fromkeys(row["N"] for row in measured):
        default = next((row for row in ours if (row["N"], row["contestant"]) == (n, ours[0]["contestant"])), None)
        peers = [row for row in measured if row["N"] == n and row["8CV GiB"] is None]
        if default is None or not peers:
            continue
        for what, limit, unit in (("memory", 1.0, "GiB"), ("time", 1.0, "seconds")):
            least = min(peers, key=lambda row: row[unit])
            name = f"{what} of kd_plugin (default budget) / {least['contestant']}, the least of all peers, N={n}"
            judged.append(Target(name, limit, default[unit] / least[unit]))
    return judged


def _plot(run: Options, rows: Sequence[Row]) -> None:
    with figure(run, "loss_memory", size=(6.4, 4.0)) as axis:
        for label in dict.fromkeys(row["contestant"] for row in rows):
            points = [(row["N"], row["GiB"]) for row in rows if row["contestant"] == label and row["GiB"] is not None]
            style = "o-" if label.startswith("kd_plugin") else "s--"
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="GiB above inputs and gradients")
        tokens = sorted({row["N"] for row in rows if row["GiB"] is not None})
        axis.set_xticks(tokens, labels=[f"{n:,}" for n in tokens])
        axis.minorticks_off()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    base, rows, budgets = Case(device=run.device), ROWS, BUDGETS_MIB
    if run.quick:
        base, rows, budgets = replace(base, vocab=16384, width=16), (256, 1024), (32.0,)
    table = Plan(run, base, rows, budgets).rows()
    _plot(run, table)
    parts = [
        f"fp32, V={base.vocab}, D={base.width}; GiB above inputs and gradients.",
        markdown([target.row() for target in targets(table)]),
        "![](results/loss_memory.png)",
        markdown(table),
    ]
    publish(run, "loss_memory", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
