"""Each contestant in a fresh process, all of them in turn, round after round.

A contestant that is alone in its process meets no other's allocator, compiler cache or threads; one that runs in
turn meets the same noise as its rivals. While one runs, the others sleep on a pipe.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from cases import Case


class Entry(NamedTuple):
    """One line of the race."""

    label: str
    contestant: str
    case: Case


class Sample(NamedTuple):
    """One timed step."""

    wall_ms: float
    cpu_ms: float
    """Processor time of all threads; grows less than wall time when others want the cores."""
    loss: float | None


@dataclass
class Outcome:
    """What a race has measured, by label: samples, one per round; why there are none; profiles."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def wall(self, label: str) -> list[float]:
        """Wall time in milliseconds, one value per round."""
        return [sample.wall_ms for sample in self.samples.get(label, [])]

    def cpu(self, label: str) -> list[float]:
        """Processor time of all cores together in milliseconds, one value per round."""
        return [sample.cpu_ms for sample in self.samples.get(label, [])]


class Worker:
    """A process that holds one or more entries with the same tensors' sizes.

    Args:
        entries: what it can be asked for.
        threads: its CPU threads.
        serve: what it runs, on its end of the pipe, the entries and the threads; by default the races' requests.
    """

    def __init__(self, entries: Sequence[Entry], threads: int, serve: Callable[..., None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.labels = [entry.label for entry in entries]
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve or _serve, args=(theirs, list(entries), threads), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Send a request, wait for the answer; an exception over there is raised here."""
        self.send(*request)
        return self.answer()

    def send(self, *request: Any) -> None:
        """Send a request, whose `answer` is fetched later."""
        with suppress(BrokenPipeError, ConnectionResetError):  # which fetching the answer says
            self._pipe.send(request)

    def answer(self, seconds: float | None = None) -> Any:
        """Wait for the answer to the last request.

        Raises:
            TimeoutError: none came within `seconds`.
            RuntimeError: the process is gone.
        """
        try:
            if not self._pipe.poll(seconds):
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError("the process was killed, most likely for its memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self, patience: float = 10) -> None:
        """End the process, by force if it has not ended after `patience` seconds."""
        self._pipe.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.terminate()


def race(
    groups: Sequence[Sequence[Entry]],
    *,
    threads: int,
    seconds: float,
    fewest: int = 3,
    most: int = 7,
    profile: Sequence[str] = (),
) -> Outcome:
    """Time every entry once per round.

    Args:
        groups: entries of one group share a process (variants of one contestant); give rivals a group each.
        threads: CPU threads of each process.
        seconds: no further round is begun that would end after about this long, warm-up included.
        fewest: rounds that are run whatever the clock says; a median of one is none.
        most: rounds after which it ends.
        profile: labels to profile once after the last round.
    """
    outcome, workers = Outcome(), []
    begin = time.perf_counter()
    try:
        for group in groups:
            workers += _started(group, threads, outcome)
        for count in range(1, most + 1):
            round_begin = time.perf_counter()
            for worker in workers:
                _time_each(worker, outcome)
            now = time.perf_counter()
            if count >= fewest and now - begin + (now - round_begin) > seconds:
                break
        for worker in workers:
            for label in set(profile) & set(worker.labels):
                outcome.profiles[label] = worker.ask("profile", label)
    finally:
        for worker in workers:
            worker.close()
    return outcome


def _time_each(worker: Worker, outcome: Outcome) -> None:
    for label in list(worker.labels):
        try:
            sample = worker.ask("time", label)
        except RuntimeError as error:
            outcome.failed[label] = str(error)
            worker.labels.remove(label)
        else:
            outcome.samples.setdefault(label, []).append(sample)


def _started(group: Sequence[Entry], threads: int, outcome: Outcome) -> list[Worker]:
    worker = Worker(group, threads)
    try:
        for entry in group:
            begin = time.perf_counter()
            worker.ask("warm up", entry.label)
            print(f"  {entry.label}: ready in {time.perf_counter() - begin:.0f} s", flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome.failed |= {entry.label: reason for entry in group}
        print(f"  {entry.label}: {reason}", flush=True)
        worker.close()
        return []
    return [worker]


def _serve(pipe: Connection, entries: list[Entry], threads: int) -> None:
    import torch
    from cases import make_tensors
    from contestants import CONTESTANTS

    torch.set_num_threads(threads)
    tensors: dict[Any, Any] = {}
    steps: dict[str, Any] = {}
    cases = {entry.label: entry.case for entry in entries}

    def prepare(entry: Entry) -> None:
        case = entry.case
        key = (case.rows, case.vocab, case.width, case.dtype, case.ignored, case.logit_std, case.seed)
        if key not in tensors:
            tensors[key] = make_tensors(case)
        steps[entry.label] = CONTESTANTS[entry.contestant](case, tensors[key])

    while True:
        try:
            what, label = pipe.recv()
        except EOFError:
            return
        try:
            if what == "warm up":
                prepare(next(entry for entry in entries if entry.label == label))
                steps[label]()
                pipe.send(None)
            elif what == "time":
                pipe.send(timed(steps[label], cases[label].device))
            else:
                from time_split import time_split

                pipe.send(time_split(steps[label]))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def timed(step: Any, device: str) -> Sample:
    """Time one call of `step`, in milliseconds."""
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    loss = step()
    wait()
    sample = (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
    return Sample(*sample, None if loss is None else float(loss))
