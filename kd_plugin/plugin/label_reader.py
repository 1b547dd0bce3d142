"""The label of each row, of the labels that an attached student is called with: as its own loss reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.plugin import arguments
from kd_plugin.plugin.label_table import CONVENTIONS
from kd_plugin.plugin.labels import Convention, LabelError, decoder_input_ids, row_targets
from kd_plugin.plugin.probe import Observed
from kd_plugin.plugin.replaced_forward import is_patched
from kd_plugin.plugin.token_ids import check_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Keywords that ask a forward for other outputs than its loss, and what to do instead.
_REQUESTS = {
    "fused_lm_head": (
        "TRL's trainer asks for the outputs of its fused head (log_probs, entropy), which a distillation loss does not "
        "have: let it take the loss that the model returns, `class DistillSFTTrainer(SFTTrainer): compute_loss = "
        "transformers.Trainer.compute_loss`"
    ),
}


class LabelReader:
    """Makes of the labels that a student is called with the label of each row.

    Args:
        model: the student, peft's wrapper included.
        observed: what it showed at `attach`.

    Raises:
        LabelError: it showed a loss of its own that is no plain cross-entropy.
    """

    def __init__(self, model: PreTrainedModel, observed: Observed) -> None:
        self._model = model
        self._base = _base(model)
        self.convention, self._why_unknown = _convention_of(self._base, observed)

    @property
    def shift(self) -> bool:
        """Whether the student's own loss shifts its labels, as it is taken to where that is not known."""
        return self.convention is None or self.convention.shift

    @uncompiled
    def targets(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        shift_labels: Tensor | None,
        *,
        ignore_index: int,
        vocab_size: int | None,
    ) -> Tensor:
        """The label of each row `[B, S]`; an encoder-decoder's `decoder_input_ids` are added to `inputs`.

        Args:
            inputs: of the forward, without labels.
            labels: `[B, S]`, as the model takes them.
            shift_labels: `[B, S]`, by row; goes before `labels`.
            ignore_index: the label of rows that do not count.
            vocab_size: token ids of the student's head; None if the caller knows that every label is one of them.

        Raises:
            ValueError: the caller wants other outputs, the convention is not known, or a label is out of range.
        """
        _refuse_other_outputs(inputs)
        given = arguments.labels(labels if shift_labels is None else shift_labels)
        if vocab_size is not None:
            check_labels(given, vocab_size, ignore_index)
        if shift_labels is None and self.convention is None:
            raise LabelError(
                f"which row a label of {type(self._model).__name__} belongs to is not known ({self._why_unknown}): "
                "attach while its weights are present, or pass shift_labels, the label of each row itself"
            )
        convention = self.convention or Convention(shift=False)
        if self._makes_decoder_inputs(inputs):
            inputs["decoder_input_ids"] = decoder_input_ids(self._base, given, convention, ignore_index)
        if shift_labels is not None:
            return given
        return row_targets(given, convention, ignore_index, inputs.get("attention_mask"))

    def _makes_decoder_inputs(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the student is an encoder-decoder that is left to make its decoder's inputs of its labels."""
        given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        return bool(getattr(self._model.config, "is_encoder_decoder", False)) and not given


def _refuse_other_outputs(inputs: Mapping[str, Any]) -> None:
    for name, cure in _REQUESTS.items():
        if inputs.get(name):
            raise ValueError(f"the student was called with {name}={inputs[name]}: {cure}")


def _base(model: PreTrainedModel) -> PreTrainedModel:
    """The Transformers model inside peft's."""
    inner: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def _convention_of(model: PreTrainedModel, observed: Observed) -> tuple[Convention | None, str]:
    """How the student reads its labels: as it showed, or by the table for a class of Transformers'; and why not.

    Raises:
        LabelError: it showed a loss of its own that is no plain cross-entropy.
    """
    if observed.convention is not None:
        return observed.convention, ""
    if observed.contradicts:
        raise LabelError(
            f"which row a label of the student belongs to cannot be known: {observed.why}; use DistillHead directly"
        )
    for kind in type(model).__mro__:
        own = type(model).forward is getattr(kind, "forward", None) and "_loss_function" not in model.__dict__
        if (
            own
            and not is_patched(model)
            and kind.__module__.startswith("transformers.")
            and kind.__name__ in CONVENTIONS
        ):
            logger.info("student: labels of a %s are read by the table (%s)", kind.__name__, observed.why)
            return Convention(*CONVENTIONS[kind.__name__]), ""
    if observed.after_head is None:
        return None, f"{observed.why}, and {type(model).__name__} is in no table"
    shift = not getattr(model.config, "is_encoder_decoder", False)
    logger.warning(
        "the student (%s) has no loss of its own to learn from (%s): row s is taken to predict labels[s%s], as in "
        "Hugging Face's %s; pass shift_labels, the label of each row itself, if that is wrong",
        *(type(model).__name__, observed.why, " + 1" if shift else ""),
        "causal language models" if shift else "encoder-decoders",
    )
    return Convention(shift), ""
