"""TensorBoard's files: tag names, and the writer of rank 0.

Tags are `[a-z0-9_/]`, x is the optimizer step. What the plugin measures keeps its name and gets a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from kd_plugin.divergences.measures import MEASURED

__all__ = ["TAGS", "NullWriter", "TensorBoardWriter", "Writer", "evaluated", "make_writer", "sample_tag", "tagged"]

TAGS = {
    name: f"{folder}/{name}"
    for folder, names in {
        "train": (
            *("loss", "soft_loss", "hard_loss", "router_loss"),
            *("grad_norm", "lr", "tokens_per_second", "step_time_ms"),
        ),
        "distill": (*MEASURED, "temperature", "valid_tokens", "chunk_size"),
        "memory": (
            "peak_allocated_gib",
            "peak_reserved_gib",
            "peak_rss_gib",
            "loss_peak_gib",
            "logits_avoided_gib",
        ),
        "time": ("teacher_ms", "student_ms", "loss_ms"),
    }.items()
    for name in names
}


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers of a training step under their tags; what has no tag is left out."""
    return {TAGS[name]: value for name, value in values.items() if name in TAGS}


def evaluated(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers measured on held-out text under their tags."""
    return {f"eval/{name}": value for name, value in values.items()}


def sample_tag(model: str) -> str:
    """Tag of the text that `model` ("teacher" or "student") has generated."""
    return f"sample/{model}"


class Writer(Protocol):
    """Where numbers go, x = optimizer step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` at `step`."""
        ...

    def text(self, tag: str, markdown: str) -> None:
        """Write a text (the configuration, samples)."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullWriter:
    """Writes nothing: TensorBoard is off, or this is not rank 0."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def text(self, tag: str, markdown: str) -> None:
        """Nothing."""

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass


class TensorBoardWriter:
    """Event files in `folder`; points from `first_step` on, left by an earlier run, are hidden."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log.tensorboard needs it: pip install 'kd-plugin[train]', or set log.tensorboard=false"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{tag: value}` at `step`, and flush: a live run is there to be watched."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def text(self, tag: str, markdown: str) -> None:
        """Write a Markdown text."""
        self._writer.add_text(tag, markdown, 0)

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def make_writer(folder: Path, *, enabled: bool, first_step: int) -> Writer:
    """A TensorBoardWriter where `enabled`, else a NullWriter."""
    return TensorBoardWriter(folder, first_step=first_step) if enabled else NullWriter()
