"""TensorBoard under a Trainer: the tags, charts and descriptions that `kd.train` writes.

The Trainer's own callback puts every number of the training under `train/`. Other trackers keep the names of `log()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir, rewrite_logs

from kd_plugin.settings.run import DistillConfig
from kd_plugin.training.charts import flat
from kd_plugin.training.tensorboard import TAGS, TensorBoardWriter

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["DistillTensorBoardCallback", "use_own_tags"]

_SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")
_SETTINGS += ("gradient_accumulation_steps", "weight_decay", "warmup_steps", "lr_scheduler_type", "bf16", "fp16")


def use_own_tags(trainer: Trainer, distill: DistillConfig) -> None:
    """Put `DistillTensorBoardCallback` where `trainer` has the Trainer's own; one with a writer of its own stays."""
    callbacks = trainer.callback_handler.callbacks
    for index, callback in enumerate(callbacks):
        if type(callback) is TensorBoardCallback and callback.tb_writer is None:
            callbacks[index] = DistillTensorBoardCallback(distill)


def tags_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `Trainer.log` by tag: those that `kd.train` knows by its tags, all others by the Trainer's."""
    tags: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, int | float):
            tags |= {TAGS[name]: value} if name in TAGS else rewrite_logs({name: value})
    if "learning_rate" in logs:
        tags[TAGS["lr"]] = logs["learning_rate"]
    return tags


class DistillTensorBoardCallback(TensorBoardCallback):
    """The Trainer's TensorBoard callback, with the tags, charts and descriptions of `kd.train`.

    Args:
        distill: the objective, which enters the hparams.
    """

    def __init__(self, distill: DistillConfig) -> None:
        super().__init__()
        self._distill = distill
        self._numbers: TensorBoardWriter | None = None
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the writer; a resumed run hides the points after the step that it continues from."""
        self._first_step = state.global_step + 1 if state.global_step else 0
        super().on_train_begin(args, state, control, **kwargs)

    def _init_summary_writer(self, args: TrainingArguments) -> None:
        folder = self.logging_dir or f"{args.output_dir}/{default_logdir()}"
        hparams = dict(self._hyperparameters(args))
        self._numbers = TensorBoardWriter(folder, first_step=self._first_step, hparams=hparams)
        self.tb_writer = self._numbers.events

    def _hyperparameters(self, args: TrainingArguments) -> Iterator[tuple[str, bool | int | float | str]]:
        yield from flat(self._distill.model_dump(mode="json"), "distill")
        known = args.to_dict()
        yield from flat({name: known[name] for name in _SETTINGS if name in known}, "train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the numbers by tag, texts as the Trainer does."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            self._init_summary_writer(args)
        if self._numbers is not None:
            self._numbers.scalars(state.global_step, tags_of(logs))
        texts = {name: value for name, value in logs.items() if not isinstance(value, int | float)}
        super().on_log(args, state, control, logs=texts, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the files; a later evaluation opens them anew."""
        if self._numbers is not None:
            self._numbers.__exit__(None, None, None)
            self._numbers = self.tb_writer = None
        super().on_train_end(args, state, control, **kwargs)
