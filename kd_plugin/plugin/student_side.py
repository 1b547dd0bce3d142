"""The student of a plugin: its head computes the loss, its own forward the hidden states, its own loss says how its
labels are meant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from kd_plugin.distributed.layout import vocab_cut, waits_for_engine
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin import causal_lm, student_head
from kd_plugin.plugin.head import DistillHead
from kd_plugin.plugin.isolation import Way, isolated
from kd_plugin.plugin.label_reader import LabelReader
from kd_plugin.plugin.loss_watch import LossWatch
from kd_plugin.plugin.probe import observe
from kd_plugin.plugin.replaced_forward import ReplacedForward
from kd_plugin.plugin.router_loss import RouterLoss, refuse_z_loss
from kd_plugin.plugin.state_watch import StateWatch
from kd_plugin.plugin.wrappers import BypassWatch
from kd_plugin.settings.run import DistillConfig


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
        self.isolation: Way | None = None
        """How documents of packed inputs are kept apart; None: as the model itself has it."""
        self.on_hidden: Callable[[Tensor], None] | None = None
        """Is given the hidden states of each forward."""
        self._engine_seen = False
        self._undo: list[Callable[[], None]] = []
        try:
            student_head.check_student(self.model, slot)
            refuse_z_loss(self.model.config)
            observed = observe(self.model, slot, "student")
            self.labels = LabelReader(self.model, observed)
            self._after_head = observed.after_head
            self._state = StateWatch(self.model, "student")
            after = observed.after_head or AfterHead()
            make = functools.partial(DistillHead, config=config, transform=after.transform, logits_bias=after.bias)
            self._undo += student_head.replace_head(slot, make)
            self._head_module = slot.module
            self._router = RouterLoss(
                self.model.config, vocab_size=self.vocab_size, shift=self.labels.shift, always=observed.adds
            )
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
    def linear(self) -> nn.Linear:
        """The layer that multiplies by the head's weight, or peft's around it, which has its attributes."""
        return cast("nn.Linear", causal_lm.unwrap(self.slot.module))

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
        """The layers that compute the loss: two inside peft's `modules_to_save`, of which one is at work."""
        return [module for module in self.slot.module.modules() if isinstance(module, DistillHead)]

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
        measure = None if self._after_head is not None else "student"
        with isolated(self.own_forward, self.isolation, inputs) as inputs:
            result, router_loss = self._router.run_backbone(
                self.slot, self.own_forward, inputs, device=device, measure=measure
            )
        if self.on_hidden is not None:
            self.on_hidden(result.hidden_states)
        if result.after_head is not None:
            if torch.is_grad_enabled():  # else nobody has seen whether something trainable is in it
                self._after_head = result.after_head
            for head in self._heads():
                head.set_after_head(*result.after_head)
        return result, router_loss

    def can_keep_head(self) -> bool:
        """Whether the head's forward would gather by itself, under FSDP2, what stays the same all through a step."""
        linear = self.linear
        plain = isinstance(linear, DistillHead) and linear is self.slot.module  # and in no adapter
        trained = any(parameter.requires_grad for parameter in linear.parameters())
        return plain and not trained and vocab_cut(linear.weight) is not None

    def head(self, hidden_states: Tensor, call: HeadCall) -> Tensor:
        """The loss sum of `call`, computed inside the head's own forward, or by a copy of the head."""
        linear = self.linear
        if call.kept_head is not None:
            assert isinstance(linear, DistillHead)
            return linear.on_copy(hidden_states, call)
        if call.vocab_slice is not None and vocab_cut(linear.weight) is not None:
            return student_head.on_slice(linear, hidden_states, call)  # past the hooks that would gather the weight
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
