"""What a run says on the terminal: rank 0 only, one grep-able line per log step, a bar on a TTY only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kd_plugin.training.interrupt import reached

__all__ = ["duration", "progress", "run_log", "step_line"]

_PACKAGE = "kd_plugin"
_PARTS = {
    "loss": ("loss", "{:.4f}"),
    "soft_loss": ("soft", "{:.4f}"),
    "hard_loss": ("hard", "{:.4f}"),
    "router_loss": ("router", "{:.4f}"),
    "top1_agreement": ("agree", "{:.1%}"),
    "lr": ("lr", "{:.1e}"),
    "grad_norm": ("gnorm", "{:.2f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "memory_gib": ("mem", "{:.1f}GiB"),
}


class _Lines(logging.Handler):
    """Prints the bare message on stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        try:
            from tqdm import tqdm
        except ImportError:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


@contextmanager
def run_log(rank: int) -> Iterator[None]:
    """Show this package's INFO lines on rank 0 while a run lasts, and be silent elsewhere.

    An application that has configured logging for itself keeps its own handlers, on all ranks.
    """
    logger = logging.getLogger(_PACKAGE)
    if logger.hasHandlers() and logger.isEnabledFor(logging.INFO):
        yield
        return
    handler = _Lines() if rank == 0 else logging.NullHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def progress(first: int, last: int, *, rank: int) -> Iterator[int]:
    """Iterate over the steps `first` to `last`, with a progress bar on rank 0 of a terminal."""
    for step in _steps(first, last, rank=rank):
        reached(step, last)
        yield step


def _steps(first: int, last: int, *, rank: int) -> Iterator[int]:
    steps = range(first, last + 1)
    if rank == 0 and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            yield from steps
        else:
            bar: Any = tqdm(steps, initial=first - 1, total=last, unit="step", leave=False)
            yield from bar
    else:
        yield from steps


def step_line(step: int, last: int, values: Mapping[str, float], *, eta_s: float) -> str:
    """The line of a logged step, without what was not measured: `step 12/40 loss 2.4113 soft 1.9012 ... eta 1m20s`."""
    parts = [f"{label} {form.format(values[name])}" for name, (label, form) in _PARTS.items() if name in values]
    return " ".join([f"step {step}/{last}", *parts, f"eta {duration(eta_s)}"])


def duration(seconds: float) -> str:
    """`seconds` as text: 45s, 1m20s or 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
