"""metrics.jsonl: the numbers of each logged step and of each evaluation, one JSON object a line.

Its keys are TensorBoard's tags, besides `step` and `time` (UTC). What is no finite number is null: JSON has no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["HELD_OUT", "MetricsFile", "first_evaluation", "read_metrics"]

NAME = "metrics.jsonl"
HELD_OUT = "eval/"
"""What the tags of numbers that were measured on held-out text begin with."""


def read_metrics(folder: Path, *, until: int) -> list[dict[str, Any]]:
    """The lines of `folder`'s metrics.jsonl up to the optimizer step `until`, in order; none where there is no file.

    A last line that a killed run has left half written is passed over.
    """
    path, kept = folder / NAME, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= until:
            kept.append(values)
    return kept


def first_evaluation(folder: Path) -> dict[str, float]:
    """What was measured on held-out text before step 1, by name; empty where `folder`'s metrics.jsonl lacks it."""
    for values in read_metrics(folder, until=0):
        measured = {tag.removeprefix(HELD_OUT): value for tag, value in values.items() if tag.startswith(HELD_OUT)}
        if measured:
            return {name: math.nan if value is None else value for name, value in measured.items()}
    return {}


class MetricsFile:
    """Writes `folder`/metrics.jsonl, after the lines of an earlier run up to the step `done`, which it continues."""

    def __init__(self, folder: Path, *, done: int | None) -> None:
        earlier = [] if done is None else read_metrics(folder, until=done)
        aside = folder / f"{NAME}.partial"
        aside.write_text("".join(f"{json.dumps(values)}\n" for values in earlier), encoding="utf-8")
        aside.replace(folder / NAME)
        self._file = (folder / NAME).open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` of `step` as one line, and flush it."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **finite}
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Nothing: texts are in config.yaml and summary.json."""

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
