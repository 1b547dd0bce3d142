"""TRL's trainers that let the student write what it is distilled on: GKDTrainer and DistillationTrainer.

Notable decisions:
- TRL generates, and asks backbones and heads itself for its own loss; here the batch that it has made goes through the
  student's forward with labels, so that the loss is any that `distill` names, and no logits exist;
- DistillationTrainer counts the tokens of a step after it has generated all of them, and that count divides. GKDTrainer
  generates one micro-batch after the other, when the Trainer has counted others: where it generates, each micro-batch
  is divided by its own tokens of all ranks, and a step is the mean of its micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.hf import batches
from kd_plugin.hf import teacher as teachers
from kd_plugin.hf.refusals import UnsupportedError
from kd_plugin.hf.trainer import DistillTrainerMixin
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX

__all__ = ["DistillOnPolicyMixin"]

logger = logging.getLogger(__name__)

_OF_GENERATION = ("prompts", "prompt_attention_mask", "num_items_in_batch", "original_prompt_text", "byte_offsets")
_COMPLETIONS = (
    "prompt_ids",
    "completion_ids",
    "prompt_mask",
    "completion_mask",
    "tool_mask",
    "num_images",
    "num_tiles",
)
_IN_DISTILL = ("beta",)
"""Settings of TRL's loss, which `distill` has in its own words."""


class DistillOnPolicyMixin(DistillTrainerMixin):
    """`class DistillGKDTrainer(DistillOnPolicyMixin, GKDTrainer): ...`, and likewise before DistillationTrainer.

    Args:
        *positional: of the trainer.
        teacher: as for `DistillTrainerMixin`, in place of the trainer's own `teacher_model`.
        **keywords: of `DistillTrainerMixin` and of the trainer. Its `temperature` is that of sampling alone, and the
            loss is that of `distill`.

    Raises:
        ValueError: as `DistillTrainerMixin`; `teacher_model`, or a teacher that is to run ahead of what is generated.
    """

    teacher_model: Any

    def __init__(self, *positional: Any, teacher: nn.Module | str | None, **keywords: Any) -> None:
        if keywords.get("teacher_model") is not None:
            raise UnsupportedError("teacher_model is TRL's name: pass the teacher as `teacher`")
        if keywords.get("teacher_micro_batches", 1) > 1:
            raise UnsupportedError(
                "teacher_micro_batches: what is generated in a step is not there before it; leave it at 1"
            )
        if (distill := keywords.get("distill")) is not None and distill.soft_everywhere:
            raise UnsupportedError(
                "distill.soft_on is all, and what the student has generated is all that it is distilled on: set it to "
                "trained"
            )
        loaded = teachers.load_by_name(teacher)
        if hasattr(type(self), "generalized_jsd_loss"):  # GKD's constructor looks at its configuration
            keywords["teacher_model"] = loaded
        super().__init__(*positional, teacher=loaded, **keywords)
        self._warn_of_idle()

    def _place_teacher(self, sharding: teachers.Sharding) -> None:
        """As always, unless TRL has put the teacher into a DeepSpeed engine already; TRL's own uses find it there."""
        made = getattr(self, "teacher_model", None)
        if made is not None and made is not self._teacher:
            self.plugin.teacher = made
        else:
            super()._place_teacher(sharding)
        self.teacher_model = self.plugin.teacher

    def _warn_of_idle(self) -> None:
        fields = type(self.args).__dataclass_fields__
        for name in _IN_DISTILL:
            value = getattr(self.args, name, None)
            if name in fields and value not in (fields[name].default, getattr(self.distill, name)):
                logger.warning(
                    "%s=%s of %s has no effect: the loss is that of `distill` (%s, %s=%s)",
                    *(name, value, type(self.args).__name__, self.distill.divergence, name, self.distill.beta),
                )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch; what GKD generates in it is not what the Trainer has counted."""
        if getattr(self, "lmbda", 0.0) > 0 or getattr(self, "seq_kd", False):
            num_items_in_batch = None
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss (0-d) of what was generated; the output beside it, if asked for, has no logits."""
        assert self.model is not None
        if not self.model.training:
            inputs = {**inputs, **batches.without_repeats(self._student_inputs(inputs), self.accelerator, self.plugin)}
        elif (counted := inputs.get("num_items_in_batch")) is not None:  # all tokens that were generated for this step
            given = self._student_inputs(inputs)
            outputs = model(**given, num_items_in_batch=counted.clamp(min=1.0))
            loss = outputs.loss * self.accelerator.num_processes  # gradients are averaged over the ranks
            return (loss, outputs) if return_outputs else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The whole sequences of a batch of GKD's, or of DistillationTrainer's prompts and completions, with labels."""
        others = {name: value for name, value in inputs.items() if name not in (*_OF_GENERATION, *_COMPLETIONS)}
        if "completion_ids" not in inputs or "labels" in inputs:
            return others
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]  # [B, P], [B, C]
        trained = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # [B, C]
        labels = completion.masked_fill(trained == 0, OWN_IGNORE_INDEX)
        return {
            **others,
            "input_ids": torch.cat([prompt, completion], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            "labels": torch.cat([torch.full_like(prompt, OWN_IGNORE_INDEX), labels], 1),
        }
