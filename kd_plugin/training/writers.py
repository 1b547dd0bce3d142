"""What a run writes its numbers to: metrics.jsonl always, TensorBoard and trackers where wanted; rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from kd_plugin.settings.run import RunConfig
from kd_plugin.training.charts import hyperparameters
from kd_plugin.training.metrics_file import MetricsFile
from kd_plugin.training.tensorboard import TensorBoardWriter, Writer
from kd_plugin.training.trackers import open_tracker

__all__ = ["Writers", "open_writers"]


class Writers:
    """Hands every number and text to each of several writers, or to none."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers
        self._stack = ExitStack()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` at `step` everywhere."""
        for writer in self._writers:
            writer.scalars(step, values)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a Markdown text at `step` everywhere."""
        for writer in self._writers:
            writer.text(tag, markdown, step)

    def __enter__(self) -> Writers:
        for writer in self._writers:
            self._stack.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def open_writers(config: RunConfig, *, rank: int, done: int | None) -> Writers:
    """The writers of a run in its folder, which is there; on other ranks than 0 they write nothing.

    `done` is the last step of the run that this one continues, or None.
    """
    if rank:
        return Writers(())
    folder = Path(config.log.output_dir)
    writers: list[Writer] = [MetricsFile(folder, done=done)]
    if config.log.tensorboard:
        first_step = 0 if done is None else done + 1
        writers.append(TensorBoardWriter(folder, first_step=first_step, hparams=hyperparameters(config)))
    for name in sorted(set(config.log.report_to) - {"tensorboard"}):
        writers.append(open_tracker(name, folder, hyperparameters(config)))
    return Writers(writers)
