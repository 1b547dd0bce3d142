"""What the evaluations of a run decide: whether it ends early, and whose weights are exported.

Notable decisions:
- a run that is resumed goes on counting: the evaluations before it are read from metrics.jsonl;
- the best student is kept beside the checkpoints, written aside and renamed as they are, so that neither pruning nor
  resuming touches it. One that is later than the step that a run resumes at belongs to another future, and is passed
  over.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_plugin.engines.protocol import Engine
from kd_plugin.settings.held_out import is_better
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.checkpoint import written_aside
from kd_plugin.training.metrics_file import HELD_OUT, read_metrics

__all__ = ["Best", "EarlyStop"]

logger = logging.getLogger(__name__)


class EarlyStop:
    """`train.stop_on`: counts evaluations in which the metric has not got better."""

    def __init__(self, config: RunConfig, *, done: int | None) -> None:
        self._settings = config.train.stop_on
        self._best: float | None = None
        self._without = 0
        if self._settings is not None and done is not None:
            tag = f"{HELD_OUT}{self._settings.metric}"
            lines = read_metrics(Path(config.log.output_dir), until=done)
            # By step: the one that a run resumes at is evaluated twice. The student before step 1 does not count.
            earlier = {values["step"]: values[tag] for values in lines if tag in values and values["step"]}
            for value in earlier.values():
                self._count(math.nan if value is None else value)

    @property
    def is_over(self) -> bool:
        """Whether the run that is resumed had come to its end by this already."""
        return self._settings is not None and self._without >= self._settings.patience

    def ends(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the evaluation after `step` is one too many without a better one; says so. The same on all ranks."""
        if self._settings is None:
            return False
        self._count(values[self._settings.metric])
        if not self.is_over:
            return False
        logger.info(
            "train.stop_on: %s was not better than %.4g by more than %g in %d evaluations: ending at step %d",
            *(
                self._settings.metric,
                math.nan if self._best is None else self._best,
                self._settings.min_change,
                self._without,
                step,
            ),
        )
        return True

    def _count(self, value: float) -> None:
        settings = self._settings
        assert settings is not None
        better = math.isfinite(value)
        better = better and (self._best is None or is_better(settings.metric, value, self._best, settings.min_change))
        self._best, self._without = (value, 0) if better else (self._best, self._without + 1)


class Best:
    """`train.export_best`: the student of the best evaluation after a step, in `log.output_dir`/best."""

    def __init__(self, config: RunConfig, *, done: int | None) -> None:
        self._metric = config.train.export_best
        self.folder = Path(config.log.output_dir) / "best"
        self.step: int | None = None
        """After which step the best evaluation so far was; None before the first."""
        self.values: dict[str, float] = {}
        """The numbers of that evaluation."""
        if self._metric is not None and done is not None and (self.folder / "run.json").is_file():
            run: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
            if run["step"] <= done:
                self.step, self.values = run["step"], run["values"]

    def look(self, engine: Engine, step: int, values: Mapping[str, float]) -> None:
        """Keep the student if its evaluation after `step` is the best so far. All ranks call this."""
        metric = self._metric
        if metric is None or not math.isfinite(values[metric]):
            return
        if self.step is not None and not is_better(metric, values[metric], self.values[metric]):
            return
        self.step, self.values = step, dict(values)
        with written_aside(self.folder, {"step": step, "values": self.values}) as partial:
            engine.save(partial / "engine")

    def restore(self, engine: Engine, last: int) -> int:
        """Put the best student's weights back, if they are not those of step `last`; returns their step.

        All ranks call this.
        """
        if self._metric is None or self.step is None or self.step == last:
            return last
        engine.load(self.folder / "engine")
        logger.info("train.export_best: the student of step %d, %s %.4g", *self._said())
        return self.step

    def _said(self) -> tuple[int, str, float]:
        assert self._metric is not None and self.step is not None
        return self.step, self._metric, self.values[self._metric]
