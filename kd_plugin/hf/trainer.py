"""`DistillTrainer`, and the mixin that gives any subclass of the Hugging Face Trainer a teacher.

Notable decisions:
- `attach` follows the whole constructor: TRL's SFTTrainer replaces the student's forward in it, and peft adapters are
  put in there; accelerate wraps the student when training starts, which is after;
- the loss is the model's own, as `Trainer.compute_loss` takes it, whatever a subclass has put in its place;
- what is logged as loss is the mean over the tokens of the whole window and of all ranks, so that it is the weighted
  sum of the soft and the hard loss beside it;
- an evaluation is measured apart from the steps around it, by the training's objective.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from kd_plugin.hf import batches, logged
from kd_plugin.hf import teacher as teachers
from kd_plugin.hf.refusals import UnsupportedError, refuse_arguments, refuse_parallelism
from kd_plugin.hf.tracking import use_own_tags
from kd_plugin.loss import checks
from kd_plugin.plugin.attach import Plugin, attach
from kd_plugin.plugin.tokenizers import TokenizerPair
from kd_plugin.settings.run import DistillConfig

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

    _Trainer = Trainer
else:
    _Trainer = object

__all__ = ["DistillTrainer", "DistillTrainerMixin"]


class DistillTrainerMixin(_Trainer):
    """Put it before a Trainer: `class DistillSFTTrainer(DistillTrainerMixin, trl.SFTTrainer): ...`.

    Args:
        *positional: of the trainer.
        teacher: a model, or a name or folder that is loaded frozen; None if `distill.soft_weight` is 0.
        distill: the objective; default `DistillConfig()`.
        tokenizers: `(student_tokenizer, teacher_tokenizer)`, compared if given.
        teacher_sharding: on several ranks "shard" (FSDP2, or a ZeRO-3 engine under DeepSpeed) or "replicate".
        teacher_micro_batches: how many micro-batches of an optimizer step the teacher reads at once, ahead of the
            student: a sharded teacher is then gathered less often, for its last hidden states of the step in memory.
        **keywords: of the trainer.

    Raises:
        ValueError: an option of the trainer under which nothing, or something else, would be distilled; or what
            `kd_plugin.attach` refuses.
    """

    plugin: Plugin
    """What binds the student to its teacher; `plugin.detach()` gives both back."""

    def __init__(
        self,
        *positional: Any,
        teacher: nn.Module | str | None,
        distill: DistillConfig | None = None,
        tokenizers: TokenizerPair | None = None,
        teacher_sharding: teachers.Sharding = "shard",
        teacher_micro_batches: int = 1,
        **keywords: Any,
    ) -> None:
        if teacher_micro_batches < 1:
            raise UnsupportedError(f"teacher_micro_batches is {teacher_micro_batches}; wanted 1 or more")
        self.distill = checks.distill_config(DistillConfig() if distill is None else distill)
        given = inspect.signature(super().__init__).bind_partial(*positional, **keywords).arguments
        refuse_arguments(given.get("args"), given.get("compute_loss_func"), self.distill)
        super().__init__(*positional, **keywords)
        refuse_parallelism(self)
        use_own_tags(self, self.distill)
        self._tokenizers, self._together = tokenizers, teacher_micro_batches
        self._teacher = teachers.load_by_name(teacher)
        self._attach(self.model)
        self._place_teacher(teacher_sharding)

    def _place_teacher(self, sharding: teachers.Sharding) -> None:
        if self._teacher is not None:
            self.plugin.teacher = teachers.place_teacher(self._teacher, self.accelerator, sharding)

    def _attach(self, student: nn.Module | None) -> None:
        assert student is not None
        self.plugin = attach(student, self._teacher, self.distill, tokenizers=self._tokenizers)
        # The attached forward takes num_items_in_batch, whatever the model's own does; it is counted as labels are read
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self.plugin.labels.shift
        self._soft_items: Tensor | int = 0

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the student of `model_init`; the teacher goes from the last one to this."""
        model = super().call_model_init(trial)
        if hasattr(self, "plugin"):  # else the constructor attaches
            placed = self.plugin.teacher
            self.plugin.detach()
            self._attach(model)
            self.plugin.teacher = placed
        return model

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, over which the teacher may run ahead, and their number of tokens."""
        convention = self.plugin.labels.convention
        counted = (batches.counted_as_read(batch, convention) for batch in epoch_iterator)
        found, num_items = super().get_batch_samples(counted, num_batches, device)
        if self.distill.soft_everywhere and num_items is not None:
            self._soft_items = batches.count_soft_rows(found, self, device)
        if self._together > 1 and len(found) > 1:
            found = [self._prepare_inputs(batch) for batch in found]
            with self.accelerator.autocast():
                self.plugin.teacher_ahead(found, self._together)
        return found, num_items

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch are keyword arguments of the student's forward: all of it."""
        return dict(inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss (0-d), which the student returns for its labels; with its output if asked."""
        given = self._student_inputs(inputs)
        if self.distill.soft_everywhere and num_items_in_batch is not None:
            given["soft_items_in_batch"] = self._soft_items
        return Trainer.compute_loss(self, model, given, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the loss of the training all that the distillation has measured since it was last logged."""
        if logged.is_training_log(logs):
            logs.update(logged.of_training(self._measured(), self.distill, self.accelerator))
        super().log(logs, start_time)

    def _measured(self) -> dict[str, float]:
        """The plugin's numbers since they were last asked for, also by TRL's names for TRL's trainers. Collective."""
        measured = self.plugin.metrics()
        if hasattr(self, "_metrics") and "student_entropy" in measured:
            measured["entropy"] = measured["student_entropy"]
        return measured

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate or predict; the metrics have the losses of this alone, over the tokens of all ranks."""
        self._labelled = False
        with self.plugin.unmeasured(), self.plugin.objective(logged.evaluation_objective(self.distill)):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            measured = self._measured() if self._labelled else None
        if measured is not None and output.metrics is not None:
            output.metrics.update(logged.of_evaluation(measured, self.distill, metric_key_prefix))
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The loss of one batch; its logits, which the loss does without, by a forward of their own where asked for."""
        if not isinstance(inputs, Mapping):  # prompts, of which a trainer of TRL's makes the batch first
            self._labelled = True
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        labelled = any(inputs.get(name) is not None for name in batches.LABELS)
        self._labelled |= labelled
        inputs = batches.without_repeats(inputs, self.accelerator, self.plugin)
        generates = getattr(self.args, "predict_with_generate", False)
        if prediction_loss_only or generates or not labelled:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            given = self._student_inputs(prepared)
            asked = batches.without_labels(given, self.plugin.student, self.plugin.labels.convention)
            logits = model(**asked).logits
        return loss, logits.detach(), prepared["labels"]


class DistillTrainer(DistillTrainerMixin, Trainer):
    """The Hugging Face Trainer with a teacher: `DistillTrainer(model=..., teacher=..., distill=..., args=...)`."""
