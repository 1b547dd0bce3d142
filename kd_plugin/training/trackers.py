"""Trackers of accelerate as writers: wandb, trackio, mlflow; their projects are called kd_plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["TrackerWriter", "open_tracker"]

_PROJECT = "kd_plugin"


class TrackerWriter:
    """Hands every number to a tracker of accelerate, which has the settings of the run; `step` is the x axis."""

    def __init__(self, tracker: GeneralTracker, settings: Mapping[str, bool | int | float | str]) -> None:
        self._tracker = tracker
        tracker.start()
        tracker.store_init_configuration(dict(settings))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log `{tag: value}` at `step`."""
        self._tracker.log(dict(values), step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Nothing: not every tracker takes texts, and they are in config.yaml and summary.json."""

    def __enter__(self) -> TrackerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.finish()


def open_tracker(name: str, folder: Path, settings: Mapping[str, bool | int | float | str]) -> TrackerWriter:
    """Start a run named after `folder` with the tracker `name`; only rank 0 calls this.

    Raises:
        ImportError: accelerate or the tracker's own package is not installed.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # without it, accelerate's loggers raise
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(_PROJECT, run_name=folder.name) if name == "mlflow" else kind(_PROJECT, name=folder.name)
    tracker.main_process_only = False  # this is the only process that asks
    return TrackerWriter(tracker, settings)
