"""The Hugging Face Trainer that is calling the student, if one is: what it wants, and what it keeps to itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_CALLING = ("compute_loss", "training_step", "prediction_step")
"""Methods of a Hugging Face Trainer in which it calls its model."""


class LogitsWanted(ValueError):
    """The student was called for logits, which do not exist while a teacher is attached."""


class Causes:
    """Why labels may be missing: what is certain enough to refuse, and what is likely."""

    def __init__(self, refused: str, likely: str) -> None:
        self.refused, self.likely = refused, likely


def trainer_causes(frame: FrameType | None) -> Causes:
    """Look for the Hugging Face Trainer that is running this forward, if one is; called for forwards without labels."""
    likely = (
        "the labels are missing: a collator that gives none, a loss computed from the logits, a trainer that calls the "
        "backbone itself (TRL's GKD and DistillationTrainer), or one that keeps the labels (label_smoothing_factor, "
        "compute_loss_func); pass labels to the student"
    )
    for _, trainer in _trainer_frames(frame):
        return Causes(_taken_by(trainer), f"{type(trainer).__name__} gave the student no labels: {likely}")
    return Causes("", likely)


def _trainer_frames(frame: FrameType | None) -> Iterator[tuple[FrameType, object]]:
    """The methods of Hugging Face Trainers that call a model and are running, innermost first, each with its trainer.

    No other frame's variables are read: Python keeps what it shows of them, large tensors too, while the frame lives.
    """
    kind: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    while frame is not None and isinstance(kind, type):
        if frame.f_code.co_name in _CALLING:
            trainer = frame.f_locals.get("self")
            if isinstance(trainer, kind):
                yield frame, trainer
        frame = frame.f_back


def refuse_predictions(frame: FrameType | None) -> None:
    """Raise LogitsWanted if a Trainer is among the callers that wants the logits of its model."""
    for method, trainer in _trainer_frames(frame):
        if getattr(getattr(trainer, "args", None), "predict_with_generate", False):  # what it predicts is generated
            return
        if method.f_code.co_name != "prediction_step":
            continue
        if method.f_locals.get("prediction_loss_only") is not False:  # whoever asks it for more takes that elsewhere
            return
        raise LogitsWanted(
            f"{type(trainer).__name__} wants the student's logits (predict, or evaluate with compute_metrics), "
            "which do not exist while a teacher is attached: plugin.detach() first, or set "
            "TrainingArguments(prediction_loss_only=True) and read the loss and plugin.metrics(), or use "
            "kd_plugin.hf.DistillTrainer"
        )


def _taken_by(trainer: Any) -> str:
    name = type(trainer).__name__
    if getattr(trainer, "label_smoother", None) is not None:
        factor = trainer.args.label_smoothing_factor
        return (
            f"{name} keeps the labels for label_smoothing_factor={factor}: set it to 0, and "
            f"DistillConfig(label_smoothing={factor}) for the hard loss"
        )
    if getattr(trainer, "compute_loss_func", None) is not None:
        return f"{name} keeps the labels for its compute_loss_func: leave it out, the student returns the loss"
    return ""
