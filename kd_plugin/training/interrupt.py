"""A run that is told to stop (Ctrl-C, SIGTERM) ends with one line and the exit code of its signal.

Notable decisions:
- the signal is raised in the main thread, as a KeyboardInterrupt, so that every `finally` runs. A main thread that
  waits inside a collective cannot be reached so; a second thread, woken by the C handler, then ends the process;
- launchers pass on what the terminal has sent to all processes already, so the same signal within a second is one;
- nothing here knows what a run is: who asks for it says what to print.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TypeAlias

__all__ = ["Ended", "Interrupted", "last_step", "one_line_end", "reached"]

_Handler: TypeAlias = "Callable[[int, FrameType | None], object] | int | None"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 10
"""How long the main thread may take to end by itself; torchrun kills after 30 s."""
_ONE_PRESS_S = 1.0
_LATE_S = 3.0
"""A rank may lose its peers before its own signal comes: launchers signal one after the other."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has come."""


class Ended(SystemExit):
    """The line has been printed; `code` is 128 + the signal."""


class _State:
    """What a process has once: the step of its run, and the watch over its signals."""

    step: tuple[int, int] | None = None
    watch: _Watch | None = None
    at_fork = False


def reached(step: int, last: int) -> None:
    """Note that step `step` of `last` begins, for the line that an interrupted run ends with."""
    _State.step = (step, last)


def last_step() -> tuple[int, int] | None:
    """The step that this run has begun last, and the number of all; None before the first."""
    return _State.step


@contextmanager
def one_line_end(line: Callable[[str], str | None], *, several: bool) -> Iterator[None]:
    """End the body on SIGINT or SIGTERM: print a line on stderr and raise Ended.

    `line` gets what happened ("interrupted", "ended by SIGTERM") and returns what to print, or None for nothing.
    With `several` ranks, a RuntimeError waits a moment for the signal that may have been its cause. Signals that
    the process ignores stay ignored, and outside the main thread, where no handler can be installed, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.step = None
    watch = _Watch(line)
    watch.start()
    try:
        with _waits_for_signal(watch) if several else nullcontext():
            yield
    except BaseException:  # once a signal has come, whatever else fails on the way out is its consequence
        if watch.came is None:
            raise
        watch.tell()
        raise Ended(128 + watch.came) from None
    finally:
        watch.stop()


@contextmanager
def _waits_for_signal(watch: _Watch) -> Iterator[None]:
    """Wait a moment after a RuntimeError of the body: a signal may have been its cause, or may follow from it."""
    try:
        yield
    except RuntimeError as error:
        if watch.came:
            raise
        with suppress(Interrupted):
            time.sleep(_LATE_S)
        if watch.came == signal.SIGTERM:  # perhaps because of this error, so that it must not be lost
            watch.why = f" after {type(error).__name__}: {' '.join(str(error).split())}"
        raise


class _Watch:
    """Handlers for the signals, and the thread that ends the process when they do not get through."""

    def __init__(self, line: Callable[[str], str | None]) -> None:
        self.came: int | None = None
        self.why = ""
        self._line, self._told = line, threading.Lock()
        self._before: dict[int, _Handler] = {}
        self._wakeup = -1

    def start(self) -> None:
        """Install the handlers."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: it is not Python's
                self._before[number] = signal.signal(number, self._handle)
        _State.watch = self
        if not _State.at_fork:
            os.register_at_fork(after_in_child=_forget)
            _State.at_fork = True
        self._thread = threading.Thread(target=self._run, name="kd_plugin signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Put the handlers back and end the thread."""
        self.restore()
        self._writer.close()  # which the thread reads as the end
        self._thread.join()
        self._reader.close()

    def restore(self) -> None:
        """Put the handlers back, in the process of the run or in a fork of it."""
        _State.watch = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)

    def tell(self) -> None:
        """Print the line, once, whichever thread comes first."""
        if self._told.acquire(blocking=False):
            what = "interrupted" if self.came == signal.SIGINT else "ended by SIGTERM"
            if text := self._line(what + self.why):
                print(text, file=sys.stderr, flush=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.came = number
            raise Interrupted(signal.Signals(number).name)

    def _run(self) -> None:
        first: int | None = None
        since = 0.0
        while True:
            left = None if first is None else max(0.0, since + _PATIENCE_S - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                return self._end(first)
            received = self._reader.recv(64)
            if not received:
                return None
            for number in (n for n in received if n in self._before):  # others' signals wake it as well
                if first is None:
                    first, since = number, time.monotonic()
                elif number == first and time.monotonic() - since >= _ONE_PRESS_S:
                    return self._end(first)

    def _end(self, number: int | None) -> None:
        self.came = number
        self.tell()
        sys.stdout.flush()
        os._exit(128 + (number or 0))


def _forget() -> None:
    """Put the handlers back in a fork (of `datasets`, of a data loader), which is no run."""
    if _State.watch is not None:
        _State.watch.restore()
