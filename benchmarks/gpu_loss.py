"""Part of `gpu.py`: time, peak memory and gradient error of the loss, one process a contestant.

As many contestants as there are cores start and compile at once, on fewer tokens than are timed; then each is measured
alone, while the others sleep without tensors on the device. A second pass over them, where time is left, adds calls to
the medians. The teacher is unrelated to the student; a last table takes one that the student nearly equals, where
rounded logits hide all that is left to learn.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from cases import Case, Tensors, make_tensors
from contestants import CONTESTANTS
from gpu_part import GIB, Part, calls_within, device_times, one_line, part, peak_gib
from gpu_points import OURS, Point, groups, promised_bytes, shape_of
from race import Worker
from sampled_errors import Oracle, sampled_errors, sampled_oracle

_WARM_UP_SHARE = 0.6  # of the part's time, after which a contestant that is not ready is left out
_SECONDS_A_POINT = 0.4


class Measured(NamedTuple):
    """What a contestant's process found at one point."""

    times: list[float]  # milliseconds
    gib: float | None
    errors: tuple[float, float, float] | None  # of the loss, the hidden states' gradient and the head's


class Bench:
    """What a contestant's process does when asked; tensors are on the device while it measures, and not between."""

    def __init__(self, points: list[Point]) -> None:
        self._points = {point.label: point for point in points}
        self._held: tuple[Case, Tensors] | None = None
        self._oracles: dict[Case, Oracle] = {}

    def warm_up(self) -> dict[str, str]:
        """Import, compile and choose kernels for all points -> reasons by the labels of those that fail.

        Two numbers of tokens, so that what torch.compile makes serves any other.
        """
        failed, done = {}, set()
        most = max(point.case.rows for point in self._points.values())
        for label, (_, _, contestant, case, _) in self._points.items():
            kind = contestant, replace(case, rows=0, chunk_size=None)
            try:
                for rows in (most // 8, most // 4) if kind not in done else ():
                    small = replace(case, rows=rows, chunk_size=case.chunk_size and min(case.chunk_size, rows))
                    CONTESTANTS[contestant](small, self._tensors(small))()
                done.add(kind)
            except Exception as error:
                failed[label] = one_line(error)
        self.release()
        return failed

    def measure(self, label: str, with_errors: bool, seconds: float) -> Measured:
        """Time, memory and, if asked for, errors of one point."""
        _, _, contestant, case, _ = self._points[label]
        tensors = self._tensors(case)
        step = CONTESTANTS[contestant](case, tensors)
        step()
        first = device_times(step, case.device, calls=2)
        times = device_times(step, case.device, calls=calls_within(first[1:], seconds))
        if contestant == "GEMMs only":  # its buffers are there before it is called, and it has no gradients
            return Measured(times, None, None)
        tensors.clear()
        gib = peak_gib(step, case.device)
        return Measured(times, gib, self._errors(step, case, tensors) if with_errors else None)

    def release(self) -> None:
        """Leave the device's memory to the others."""
        self._held = None
        self._oracles.clear()
        _empty_cache()

    def _errors(self, step: Callable[[], Any], case: Case, tensors: Tensors) -> tuple[float, float, float]:
        loss = step()
        same = replace(case, chunk_size=None, row_kernel="auto", metrics=True, logits_dtype="float32")
        if same not in self._oracles:
            self._oracles = {same: sampled_oracle(case, tensors)}
        return tuple(sampled_errors(self._oracles[same], loss, tensors))

    def _tensors(self, case: Case) -> Tensors:
        """The first rows of those that all points of a shape share."""
        most = max(point.case.rows for point in self._points.values())
        whole = Case(
            rows=most,
            **{name: getattr(case, name) for name in ("vocab", "width", "teacher_width", "dtype", "autocast")},
            **{name: getattr(case, name) for name in ("device", "logit_std", "teacher_noise", "seed")},
        )
        if self._held is None or self._held[0] != whole:
            self.release()
            self._held = whole, make_tensors(whole)
            _empty_cache()  # else every process keeps what drawing them in fp32 took
        return self._held[1].first(case.rows)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(pipe: Connection, points: list[Point], threads: int) -> None:
    """Answer `(method of Bench, its arguments)` until the other end closes."""
    torch.set_num_threads(threads)
    bench = Bench(points)
    with suppress(EOFError):
        while True:
            method, *arguments = pipe.recv()
            try:
                pipe.send(getattr(bench, method)(*arguments))
            except Exception as error:
                pipe.send(RuntimeError(one_line(error)))
                bench.release()


class Contest:
    """Processes that are alive at the same time, and what they have found so far; `seconds` are theirs."""

    def __init__(self, options: Part, contestants: list[list[Point]], seconds: float) -> None:
        self._options = options
        self._rest = options.left - seconds  # is left to those that come after
        self._workers = [(Worker(points, options.threads, serve), points) for points in contestants]
        self._times: dict[str, list[float]] = {}
        self._columns: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._options.left - self._rest)

    def warm_up(self) -> None:
        """All at once; who fails, or is not ready in time, is skipped by name."""
        for worker, _ in self._workers:
            worker.send("warm_up")
        kept = self.left * (1 - _WARM_UP_SHARE)
        workers, self._workers = self._workers, []
        for worker, points in workers:
            try:
                failed = worker.answer(max(0.0, self.left - kept))
            except Exception as error:
                labels = "; ".join(point.label for point in points)
                self._options.skip(labels, f"not ready to be measured: {one_line(error)}")
                worker.close(patience=0)
                continue
            for label, reason in failed.items():
                self._options.skip(label, reason)
            self._workers.append((worker, [point for point in points if point.label not in failed]))

    def measure(self, *, first: bool) -> None:
        """One pass over all points, as far as the time goes."""
        for worker, points in self._workers:
            for point in points if worker.labels else ():
                if self.left < 1:
                    if first:
                        self._options.skip(point.label, "no time left")
                elif worker.labels and (first or point.label in self._columns):
                    self._measure(worker, point, first=first)
            if worker.labels:
                worker.ask("release")

    def _measure(self, worker: Worker, point: Point, *, first: bool) -> None:
        worker.send("measure", point.label, first, 0.05 if self._options.quick else _SECONDS_A_POINT)
        try:
            measured: Measured = worker.answer(max(2.0, self._options.left))
        except Exception as error:
            self._options.skip(point.label, error)
            if not isinstance(error, RuntimeError) or "killed" in str(error):
                worker.labels = []  # nothing more is asked of it
                worker.close(patience=0)
            return
        times = self._times.setdefault(point.label, [])
        times += measured.times
        if first:
            self._columns[point.label] = found(point, measured)
        summary = {"ms": statistics.median(times), "fastest_ms": min(times), "calls": len(times)}
        self._options.emit(point.table, key=point.label, **self._columns[point.label], **summary)

    def close(self) -> None:
        """End all processes."""
        for worker, _ in self._workers:
            worker.close(patience=2)


def found(point: Point, measured: Measured) -> dict[str, Any]:
    """A point's columns but for its times."""
    case = point.case
    errors = measured.errors or (None, None, None)
    return {
        "shape": shape_of(case),
        "tokens": case.rows,
        "contestant": point.name,
        "computes": "KL + CE" if case.hard_weight else "KL",
        "gib": measured.gib,
        "promised_gib": promised_bytes(case) / GIB if point.contestant == OURS else None,
        **dict(zip(("loss_error", "hidden_error", "weight_error"), errors, strict=True)),
    }


def main() -> int:
    """Run everything; returns the exit code."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # all processes compile at once
    options = part(__doc__)
    waiting = list(groups(options))
    together = max(2, os.cpu_count() or 1)
    while waiting:
        share = min(together, len(waiting)) / len(waiting)
        contest = Contest(options, waiting[:together], options.left * share)
        try:
            contest.warm_up()
            contest.measure(first=True)
            contest.measure(first=False)
        finally:
            contest.close()
        waiting = waiting[together:]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
