"""The student of a plugin: its head computes the loss, its own forward the hidden states, its own loss says how its
labels are meant."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.distributed.layout import vocab_cut, waits_for_engine
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin import arguments, causal_lm, student_head
from kd_plugin.plugin.head import DistillHead
from kd_plugin.plugin.label_table import CONVENTIONS
from kd_plugin.plugin.labels import Convention, LabelError, decoder_input_ids, row_targets
from kd_plugin.plugin.loss_watch import LossWatch
from kd_plugin.plugin.probe import Observed, observe
from kd_plugin.plugin.replaced_forward import ReplacedForward, is_patched
from kd_plugin.plugin.router_loss import RouterLoss, refuse_z_loss
from kd_plugin.plugin.state_watch import StateWatch
from kd_plugin.plugin.token_ids import check_labels
from kd_plugin.plugin.wrappers import BypassWatch
from kd_plugin.settings.run import DistillConfig

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


class StudentSide:
    """A student taken over.

    Args:
        student: as the user has it, perhaps compiled or in a wrapper already.
        forward: takes the place of the model's own; it runs `backbone` and `head`.
        config: the objective.

    Raises:
        ValueError: its head, its logits or its own loss cannot be followed.
    """

    def __init__(self, student: nn.Module, forward: Callable[..., Any], config: DistillConfig) -> None:
        self.model = causal_lm.unwrap_model(student)
        self.config = config
        self.slot = slot = causal_lm.find_head(self.model, "student")
        self._engine_seen = False
        self._undo: list[Callable[[], None]] = []
        try:
            student_head.check_student(self.model, slot)
            refuse_z_loss(self.model.config)
            observed = observe(self.model, slot, "student")
            self.convention, self._why_unknown = _convention_of(_base(self.model), observed)
            self._after_head = observed.after_head
            self._state = StateWatch(self.model, "student")
            self._router = RouterLoss(always=observed.adds)
            after = observed.after_head or AfterHead()
            make = functools.partial(DistillHead, config=config, transform=after.transform, logits_bias=after.bias)
            self._undo += student_head.replace_head(slot, make)
            self._head_module = slot.module
            self._bypass = BypassWatch(self.model, student)
            self._undo.append(self._bypass.remove)
            self.watch = LossWatch(self.model, slot.parent)
            self._undo.append(self.watch.remove)
            replaced = ReplacedForward(self.model, forward)
            self.own_forward: Callable[..., Any] = replaced.original
            """What the model's forward was before."""
            self._undo.append(replaced.restore)
        except Exception:
            self.restore()
            raise

    def restore(self) -> None:
        """Give the student back as it was."""
        while self._undo:
            self._undo.pop()()

    @property
    def linear(self) -> Any:
        """The layer that multiplies by the head's weight, or peft's around it."""
        return causal_lm.unwrap(self.slot.module)

    @property
    def vocab_size(self) -> int:
        """Token ids of the head, whole."""
        return self.linear.out_features

    def set_config(self, config: DistillConfig) -> None:
        """Compute the loss as `config` says from now on."""
        self.config = config
        for head in self._heads():
            head.distill_config = config

    def _heads(self) -> list[DistillHead]:
        """Of peft's modules_to_save there are two, of which one is at work."""
        return [module for module in self.slot.module.modules() if isinstance(module, DistillHead)]

    @uncompiled
    def targets(
        self, inputs: dict[str, Any], labels: Tensor | None, shift_labels: Tensor | None, *, looked_at: bool = False
    ) -> Tensor:
        """The label of each row `[B, S]`; an encoder-decoder's `decoder_input_ids` are added to `inputs`.

        Args:
            inputs: of the forward, without labels.
            labels: `[B, S]`, as the model takes them.
            shift_labels: `[B, S]`, by row; goes before `labels`.
            looked_at: whether the caller knows that every label is in the vocabulary.

        Raises:
            ValueError: the caller wants other outputs, the convention is not known, or a label is out of range.
        """
        for name, cure in _REQUESTS.items():
            if inputs.get(name):
                raise ValueError(f"the student was called with {name}={inputs[name]}: {cure}")
        given = arguments.labels(labels if shift_labels is None else shift_labels)
        if not looked_at:
            check_labels(given, self.vocab_size, self.config.ignore_index)
        if shift_labels is None and self.convention is None:
            raise LabelError(
                f"which row a label of {type(self.model).__name__} belongs to is not known ({self._why_unknown}): "
                "attach while its weights are present, or pass shift_labels, the label of each row itself"
            )
        convention = self.convention or Convention(shift=False)
        has_inputs = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if getattr(self.model.config, "is_encoder_decoder", False) and not has_inputs:
            ids = decoder_input_ids(_base(self.model), given, convention, self.config.ignore_index)
            inputs["decoder_input_ids"] = ids
        if shift_labels is not None:
            return given
        return row_targets(given, convention, self.config.ignore_index, inputs.get("attention_mask"))

    def backbone(self, inputs: dict[str, Any], device: torch.device) -> tuple[causal_lm.Backbone, Tensor | None]:
        """Hidden states and output of the model's own forward, and its router loss (0-d) if it adds one.

        `device` is that of the labels. The first such forward of a student whose weights came after `attach` also shows
        what it does to its logits.
        """
        self._bypass.check()
        if not self._engine_seen and waits_for_engine(self.model):
            raise ValueError(
                "zero.Init has partitioned the student's weights when it was loaded, and no engine gathers them: "
                "call the engine of deepspeed.initialize(model=student, ...), or of what your trainer made of it"
            )
        self._engine_seen = True
        causal_lm.still_there(self.slot, self._head_module, "student")
        if self._state.changed(inputs):  # a bias or scale of the logits, say, that has been loaded or set since
            self._after_head = None
        result, router_loss = self._router.run_backbone(
            self.slot,
            self.own_forward,
            inputs,
            config=self.model.config,
            vocab_size=self.vocab_size,
            shift=self.convention is None or self.convention.shift,
            device=device,
            measure=None if self._after_head is not None else "student",
        )
        if result.after_head is not None:
            if torch.is_grad_enabled():  # else nobody has seen whether something trainable is in it
                self._after_head = result.after_head
            for head in self._heads():
                head.set_after_head(*result.after_head)
        return result, router_loss

    def head(self, hidden_states: Tensor, call: HeadCall) -> Tensor:
        """The loss sum of `call`, computed inside the head's own forward."""
        linear = self.linear
        if call.vocab_slice is not None and vocab_cut(linear.weight) is not None:
            return student_head.on_shards(linear, hidden_states, call)  # past the hooks that would gather the weight
        if self.slot.module is not self._head_module and type(self.slot.module).__module__.startswith("peft."):
            raise ValueError(
                "peft has wrapped the student's head after attach(), where its adapter would be added to the loss and "
                "not to the logits: get_peft_model first, then attach"
            )
        forward = linear.__dict__.get("forward")
        if not (forward is None or isinstance(forward, ReplacedForward) or hasattr(linear, "_hf_hook")):
            raise ValueError(
                "the forward of the student's head was replaced after attach(), which computes the loss in it: put it "
                "back, or replace it before attach(), where it is judged by what it does"
            )
        loss_sum = self.slot.module(hidden_states, call)
        if call.sums is None:
            raise ValueError(
                "a forward pre-hook on the student's head has dropped its second argument, so the loss was not asked "
                "for: take the hook off while a teacher is attached"
            )
        if loss_sum.data_ptr() != call.sums.loss_sum.data_ptr():
            raise ValueError(
                "a forward hook on the student's head changed what it returned, which here is the loss and not logits: "
                "take the hook off while a teacher is attached"
            )
        return loss_sum


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
