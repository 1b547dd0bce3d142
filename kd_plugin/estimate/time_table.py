"""The time of a step as a table."""

from __future__ import annotations

from kd_plugin.estimate.account import Estimate
from kd_plugin.estimate.setup import Setup, has_8_bit_states, teacher_packed
from kd_plugin.estimate.step_time import Phase, StepTime

__all__ = ["duration", "exchange_times", "missing_time", "time_note", "time_rows", "time_unknowns"]

_AROUND = "20 to 60 ms"  # measured on two Zen 4 cores, of models that compute nearly nothing
_LIMITS = {
    "products": "products of matrices",
    "memory": "memory, and operations on single elements",
    "wire": "the wire",
    "host": "the host, which issues the operations",
}


def duration(seconds: float) -> str:
    """`seconds` with a unit that suits them."""
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{1e3 * seconds:,.3g} ms"


def time_rows(time: StepTime) -> list[tuple[str, ...]]:
    """A row for each phase, then the step's: name, time, share of the step, how it comes about."""
    rows = [
        (phase.name, duration(phase.seconds), _percent(phase.seconds / time.seconds), _how(phase))
        for phase in time.phases
    ]
    how = f"{time.tokens:,} tokens over all ranks, {time.tokens_per_second:,.4g} tokens/s"
    return [*rows, ("step", duration(time.seconds), "100 %", how)]


def _how(phase: Phase) -> str:
    parts = {"memory": phase.memory, "host": phase.host} if phase.products else {}
    text = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds > 0.05 * phase.seconds)
    return f"{phase.how}; of which {text}" if text else phase.how


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def time_note(time: StepTime) -> str:
    """What limits the step, and where its speeds come from."""
    shares = time.limits
    (first, most), *rest = shares.items()
    others = ", ".join(f"{name} {_percent(share)}" for name, share in rest if share > 0.01)
    text = f"{_LIMITS[first]} ({_percent(most)}{'; ' + others if others else ''})"
    return f"limited by {text}; {time.speeds.how}"


def missing_time(setup: Setup) -> list[str]:
    """Why there is no time."""
    models = {"student": setup.student, "teacher": setup.teacher}
    return [
        f"unknown: the step time, {model.why_unknown}"
        for model in models.values()
        if model is not None and model.work is None
    ]


def time_unknowns(setup: Setup) -> list[str]:
    """What the step time leaves out."""
    lines = [
        f"Python of loop, plugin and wrapper ({_AROUND} a step, which small models feel)",
        "data, logging, evaluation",
    ]
    lines += ["checkpoints", "the first step's compilation"]
    if teacher_packed(setup) is not None:
        lines.append("unpacking the teacher's quantised weights: it is timed as if it were not")
    if has_8_bit_states(setup) and setup.device == "cuda":
        lines.append("the search for 8-bit codes in the optimizer")
    if setup.teacher_streamed:
        lines.append("the teacher's way from host memory to the GPU in every forward")
    if setup.device == "cuda" and setup.world_size > 8:
        lines.append("slower links between machines: all ranks are taken to be in one")
    return [f"not in the step time: {', '.join(lines)}"]


def exchange_times(estimate: Estimate) -> str:
    """Seconds per micro-batch of each exchange; empty where they are not known from the table of peaks."""
    time = estimate.time
    if time is None or estimate.setup.device != "cuda":
        return ""
    each = {name: volume.num_bytes / time.speeds.wire for name, volume in estimate.exchanges.items()}
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in each.items())
    return f", and so the least time, since each multiplies as much ({listed})"
