"""What a model does at padding, start and end tokens, and a student in training mode: the same as else, or a refusal.

Label smoothing, a regulariser or a cap of the logits under `if self.training`, and an own loss that leaves out padding
would otherwise be lost for a whole training without a word.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin.causal_lm import HeadCallsError, HeadSlot, run_with_stand_in
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX, Convention, LabelError, learn_shift
from kd_plugin.plugin.logit_probe import LogitsChanged
from kd_plugin.plugin.probe_batch import KnownLogits, consistent, own_loss_of, reason_of, special_tokens, whole_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


_AT_SPECIAL = "at padding, start or end tokens, or where attention_mask is 0"
_IN_TRAINING = "in training mode"


class SecondLook(NamedTuple):
    """What the second look adds to the first."""

    convention: Convention | None
    adds: bool = False
    """Whether the model adds something to the cross-entropy of its labels."""


def second_look(
    model: PreTrainedModel, slot: HeadSlot, side: str, after_head: AfterHead | None, convention: Convention | None
) -> SecondLook:
    """See whether a model does at special tokens, and a student in training mode, what it did in the first look.

    Args:
        model: in the state of the first look, with gradients; its modes are changed.
        slot: where its head is.
        side: "student" or "teacher", whose own loss and training mode are of no concern.
        after_head: what it was seen to do to its logits.
        convention: how it was seen to read its labels.

    Raises:
        LogitsChanged, LabelError: it does something else; in which of the two circumstances is said.
    """
    training = side == "student"
    look = _Look(model, slot, side, after_head, convention)
    try:
        return look(training, _IN_TRAINING if training else _AT_SPECIAL)
    except (HeadCallsError, LabelError, LogitsChanged):
        if training:
            look(False, _AT_SPECIAL)
        raise
    except Exception as error:  # whatever a model says of inputs that it was not made for
        logger.warning(
            "the %s (%s) ran on plain tokens, but on padding%s failed with %s: whether it does something else to "
            "its logits or labels there is not known",
            *(side, type(model).__name__, " in training mode" if training else "", reason_of(error)),
        )
        return SecondLook(convention)


class _Look(NamedTuple):
    """The arguments of `second_look`."""

    model: PreTrainedModel
    slot: HeadSlot
    side: str
    after_head: AfterHead | None
    convention: Convention | None

    def __call__(self, training: bool, when: str) -> SecondLook:
        self.model.train(training)
        inputs, labels = special_tokens(self.model, self.slot.vocab_size)
        with_labels = self.convention is not None and self.side == "student"
        if with_labels:
            inputs["labels"] = labels
        elif getattr(self.model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        output = self._run(inputs, seed=0)
        after = consistent(output.logits, self.slot.vocab_size, self.model, self.side)
        if self.after_head is not None and not after.close_to(self.after_head):
            raise LogitsChanged(
                f"the {self.side} ({type(self.model).__name__}) changes its logits after the head in another way "
                f"{when} than else: the loss would be computed on other logits than the model's; use DistillHead "
                "directly"
            )
        return self._convention(inputs, output, when) if with_labels else SecondLook(self.convention)

    def _convention(self, inputs: dict[str, Tensor], output: Any, when: str) -> SecondLook:
        """The convention with what the special labels add to it."""
        assert self.convention is not None
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        counted = {False: labels}  # whether what the mask hides is left out -> labels that count
        if mask is not None and mask.shape == labels.shape:
            counted[True] = labels.masked_fill(mask == 0, OWN_IGNORE_INDEX)
        again = functools.cache(functools.partial(self._run, inputs, seed=1))
        for masked, some in counted.items():
            if (first := own_loss_of(output, some)) is None:
                break
            shift, adds = learn_shift(first, lambda some=some: own_loss_of(again(), some))
            if shift == self.convention.shift:
                return SecondLook(self.convention._replace(masked=masked), adds)
        raise LabelError(
            f"the student's own loss ({type(self.model).__name__}) is {when} not the mean cross-entropy of its labels, "
            "and what it does there the loss here would not: take that out of its forward, or use DistillHead directly"
        )

    def _run(self, inputs: dict[str, Tensor], seed: int) -> Any:
        torch.manual_seed(0)  # dropout and jitter the same in each run; the caller's state comes back
        known = KnownLogits(self.slot.vocab_size, seed)
        return run_with_stand_in(self.slot, whole_call(self.model), inputs, known.reply)[1]
