"""TensorBoard's files: tag names, and the writer of rank 0.

Tags are `[a-z0-9_/]`, x is the optimizer step. What the plugin measures keeps its name and gets a folder; what never
changes in a run has a folder that is sorted last.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from kd_plugin.divergences.measures import MEASURED
from kd_plugin.training.charts import LAYOUT, METRICS, describe, lines_of
from kd_plugin.training.metrics_file import HELD_OUT

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TAGS", "TensorBoardWriter", "Writer", "evaluated", "sample_tag", "tagged", "verbatim"]

TAGS = {
    name: f"{folder}/{name}"
    for folder, names in {
        "train": (
            *("loss", "soft_loss", "hard_loss", "router_loss"),
            *("grad_norm", "lr", "tokens_per_second", "step_time_ms"),
        ),
        "distill": (*MEASURED, "valid_tokens", "trained_tokens"),
        "memory": (
            "peak_allocated_gib",
            "peak_reserved_gib",
            "peak_rss_gib",
            "loss_peak_gib",
            "logits_avoided_gib",
        ),
        "time": ("teacher_ms", "student_ms", "loss_ms"),
        "z_constant": ("temperature", "chunk_size"),
    }.items()
    for name in names
}


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers of a training step under their tags; what has no tag is left out."""
    return {TAGS[name]: value for name, value in values.items() if name in TAGS}


def evaluated(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers measured on held-out text under their tags."""
    return {f"{HELD_OUT}{name}": value for name, value in values.items()}


def sample_tag(model: str) -> str:
    """Tag of the text that `model` ("teacher" or "student") has generated."""
    return f"sample/{model}"


def verbatim(text: str) -> str:
    """`text` as Markdown that shows it as it is, line feeds included."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class Writer(Protocol):
    """Where numbers go, x = optimizer step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` at `step`."""
        ...

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a Markdown text (the configuration, samples) at `step`."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TensorBoardWriter:
    """Event files in `folder` and `folder/lines`; points from `first_step` on, left by an earlier run, are hidden.

    `lines` has a run for each line of the charts that have several, which is how TensorBoard draws them in one.
    """

    def __init__(self, folder: str | Path, *, first_step: int, hparams: Mapping[str, bool | int | float | str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams as hparams_summaries
        except ImportError as error:
            raise ImportError(
                "log.tensorboard needs it: pip install 'kd-plugin[train]', or set log.tensorboard=false"
            ) from error
        self._open = partial(SummaryWriter, purge_step=first_step)
        self._folder, self._writer = Path(folder), self._open(str(folder))
        self._lines: dict[str, SummaryWriter] = {}
        self._described: set[tuple[SummaryWriter, str]] = set()
        self._writer.add_custom_scalars(LAYOUT)
        *begin, self._end = hparams_summaries(dict(hparams), dict.fromkeys(METRICS, 0.0))
        for summary in begin:
            _add(self._writer, summary)

    @property
    def events(self) -> SummaryWriter:
        """The writer of everything but the charts' lines."""
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` at `step`, and flush: a live run is there to be watched."""
        for tag, value in values.items():
            self._point(self._writer, tag, value, step)
        for line, chart, value in lines_of(values):
            if line not in self._lines:
                self._lines[line] = self._open(str(self._folder / "lines" / line))
            self._point(self._lines[line], chart, value, step)
        for writer in (self._writer, *self._lines.values()):
            writer.flush()

    def _point(self, writer: SummaryWriter, tag: str, value: float, step: int) -> None:
        """Write one number, the first time with what it means."""
        from tensorboard.compat.proto import summary_pb2

        messages: Any = summary_pb2  # made by protobuf, whose classes no type checker sees
        Summary, SummaryMetadata = messages.Summary, messages.SummaryMetadata
        metadata = None
        if (writer, tag) not in self._described:
            self._described.add((writer, tag))
            plugin = SummaryMetadata.PluginData(plugin_name="scalars")
            metadata = SummaryMetadata(plugin_data=plugin, summary_description=describe(tag))
        point = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
        _add(writer, Summary(value=[point]), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a Markdown text."""
        self._writer.add_text(tag, markdown, step)

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            _add(self._writer, self._end)
        for writer in (self._writer, *self._lines.values()):
            writer.close()


def _add(writer: SummaryWriter, summary: object, step: int | None = None) -> None:
    files = writer.file_writer
    assert files is not None  # before close()
    files.add_summary(summary, step)
