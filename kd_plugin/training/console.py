"""What a run says on the terminal: rank 0 only, one grep-able line per log step, a bar on a TTY only.

A line is as wide as the terminal, or 80 columns; the numbers that it leaves out are in metrics.jsonl.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kd_plugin.distributed.bars import bar
from kd_plugin.training.interrupt import reached

__all__ = ["duration", "eval_line", "progress", "run_log", "step_line"]

_PACKAGE = "kd_plugin"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _short(value: float) -> str:
    """A count in five characters at most: 847, 12.3k, 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


_PARTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", _number),
    "soft_loss": ("soft", _number),
    "hard_loss": ("hard", _number),
    "router_loss": ("router", _number),
    "top1_agreement": ("agree", _percent),
    "lr": ("lr", "{:.1e}".format),
    "grad_norm": ("gnorm", "{:.3g}".format),
    "tokens_per_second": ("tok/s", _short),
    "memory_gib": ("mem", "{:.1f}GiB".format),
}
_HELD_OUT: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", _number),
    "kl_t1": ("KL", _number),
    "top1_agreement": ("agree", _percent),
    "acceptance_rate": ("accept", _percent),
    "hard_loss": ("hard", _number),
    "soft_loss": ("soft", _number),
}
_IMPORTANCE = (
    *("loss", "perplexity", "soft_loss", "hard_loss", "kl_t1", "eta", "top1_agreement", "acceptance_rate"),
    *("tokens_per_second", "total", "lr", "grad_norm", "router_loss", "memory_gib"),
)


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


def progress(first: int, last: int) -> Iterator[int]:
    """Iterate over the steps `first` to `last`, with a progress bar on rank 0 of a terminal."""
    for step in bar(range(first, last + 1), what="", unit="step", total=last, done=first - 1):
        reached(step, last)
        yield step


def step_line(step: int, last: int, values: Mapping[str, float], *, eta_s: float, width: int | None = None) -> str:
    """The line of a logged step, without what was not measured: `step 12/40 loss 2.411 soft 1.901 ... eta 1m20s`.

    It is `width` columns wide at most, the terminal's where None: what is least important is left out.
    """
    shown = {name: f"{label} {form(values[name])}" for name, (label, form) in _PARTS.items() if name in values}
    return _fitted({"step": f"step {step}", **shown, "eta": f"eta {duration(eta_s)}"}, f"/{last}", width)


def eval_line(step: int, values: Mapping[str, float], *, width: int | None = None) -> str:
    """The line of an evaluation: `eval step 12 perplexity 80.61 KL 1.861 ...`, as wide as a step's."""
    shown = {name: f"{label} {form(values[name])}" for name, (label, form) in _HELD_OUT.items() if name in values}
    return _fitted({"step": f"eval step {step}", **shown}, "", width)


def _fitted(parts: dict[str, str], total: str, width: int | None) -> str:
    """As many of `parts` as fit, chosen in the order of `_IMPORTANCE`, shown in their own; the first with `total`."""
    width = _columns() if width is None else width
    room, chosen = width - len(parts["step"]), {"step"}
    for name in _IMPORTANCE:
        length = len(total) if name == "total" else len(parts.get(name, "")) + 1
        if length <= room and (name == "total" or name in parts):
            room -= length
            chosen.add(name)
    if "total" in chosen:
        parts = {**parts, "step": parts["step"] + total}
    return " ".join(text for name, text in parts.items() if name in chosen)


def _columns() -> int:
    """The columns of a line: a terminal's, 80 at least, and 80 where nothing says how wide it is."""
    return max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


def duration(seconds: float) -> str:
    """`seconds` as text: 45s, 1m20s or 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
