"""The teacher of an attached student: its forward gives hidden states to whoever asks, its head its weight.

Notable decisions:
- the teacher is called like any model, through its own wrapper; a keyword that no model knows tells its forward that
  the plugin asks, and everything else is answered as before;
- the head is used inside its own innermost forward, where FSDP, ZeRO-3 and accelerate's offloading have its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.distributed.layout import waits_for_engine, whole_shape
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.exchange.mode import Exchange
from kd_plugin.exchange.teacher_slice import Consumer, TeacherHead
from kd_plugin.loss import checks
from kd_plugin.plugin import causal_lm
from kd_plugin.plugin.head import teacher_head_forward
from kd_plugin.plugin.isolation import Way, isolated
from kd_plugin.plugin.labels import Convention
from kd_plugin.plugin.metrics import Stopwatch
from kd_plugin.plugin.plain_head import check_plain
from kd_plugin.plugin.probe import observe
from kd_plugin.plugin.replaced_forward import ReplacedForward, innermost, is_replaced
from kd_plugin.plugin.state_watch import StateWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inputs of one model's own bookkeeping, of no use to the other.
NOT_FOR_TEACHER = {"past_key_values", "use_cache", "cache_position", "inputs_embeds", "output_attentions"}
NOT_FOR_TEACHER |= {"output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"}


class TeacherSide:
    """A teacher taken over for one student.

    Args:
        teacher: as the user has it, wrapped or not.
        exchange: told what the teacher's head is.
        watch: measures the time of its backbone.

    Raises:
        ValueError: it serves another student, or has a head that cannot be distilled from.
    """

    def __init__(self, teacher: nn.Module, exchange: Exchange, watch: Stopwatch) -> None:
        if is_replaced(model := causal_lm.unwrap_model(teacher)):
            raise ValueError(
                "this teacher serves another student already: detach that plugin, or load the teacher twice"
            )
        self._exchange, self._watch = exchange, watch
        self.isolation: Way | None = None
        """How documents of packed inputs are kept apart; None: as the model itself has it."""
        self.on_hidden: Callable[[Tensor], None] | None = None
        """Is given the hidden states of each forward."""
        self._engine_seen = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._take_over(model)
        except Exception:
            self.restore()
            raise

    def _take_over(self, model: PreTrainedModel) -> None:
        self.model = model
        self._freeze(model)
        self._slot = causal_lm.find_head(model, "teacher")
        inner = causal_lm.unwrap(self._slot.module)
        linear = checks.linear_head("the teacher's head", inner, may_be_sharded=True)
        checks.not_tensor_parallel("the teacher's head", linear, model)
        check_plain("the teacher's head", linear)
        observed = observe(model, self._slot, "teacher")
        self.convention: Convention | None = observed.convention
        """How the teacher reads labels, where it showed that."""
        tied = causal_lm.is_tied(model, linear)
        self.head = TeacherHead(linear, *whole_shape(linear.weight, linear), tied, observed.after_head)
        self._exchange.teacher = self.head
        self._state = StateWatch(model, "teacher")
        self._modules = list(model.modules())
        of_model = ReplacedForward(model, self._forward, innermost(model))
        self._model_forward = of_model.original
        self._undo.append(of_model.restore)
        taken = ReplacedForward(linear, self._head_forward, innermost(linear))
        self._plain_head = taken.original
        self._undo.append(taken.restore)

    def restore(self) -> None:
        """Give the teacher back as it was."""
        while self._undo:
            self._undo.pop()()

    def look_again(self, inputs: Mapping[str, Any]) -> None:
        """Before a step with `inputs`: forget what the teacher did to its logits if it may do something else now."""
        if self._state.changed(inputs):  # a bias or scale of the logits, say, that has been loaded or set since
            self._exchange.forget_teacher()

    def run(self, teacher: nn.Module, inputs: dict[str, Any], consumer: Consumer) -> None:
        """Call `teacher`, what now wraps the model, with the student's inputs; `consumer` gets what comes of it."""
        model = causal_lm.unwrap(teacher)
        if any(module.training for module in self._modules):  # set by the train() of a module around it, or inside
            model.eval()
        if not self._engine_seen and waits_for_engine(model):
            raise ValueError(
                "zero.Init has partitioned the teacher's weights when it was loaded, and no engine gathers them: "
                "plugin.teacher, *_ = deepspeed.initialize(model=teacher, config=...) with stage 3 and no optimizer"
            )
        self._engine_seen = True
        shared = {name: value for name, value in inputs.items() if name not in NOT_FOR_TEACHER}
        self._asked = False
        with torch.no_grad():
            teacher(**shared, kd_consumer=consumer)
        if not self._asked:
            raise ValueError(
                f"plugin.teacher ({type(teacher).__name__}) is not the teacher that was attached, nor what wraps it: "
                "set it to what wraps that teacher, or detach() and attach() the other one"
            )

    # Not compiled with a teacher that is: only its backbone is, called from here.
    @torch.compiler.disable(recursive=False)
    def _forward(self, *args: Any, kd_consumer: Consumer | None = None, **kwargs: Any) -> Any:
        if kd_consumer is None:
            return self._model_forward(*args, **kwargs)
        self._asked = True
        measure = None if self.head.after_head is not None else (self.head.vocab_size, "teacher")
        # Not the head's device: ZeRO-3 gathers a weight that is looked at in a forward, and from then on in each
        device = next((value.device for value in kwargs.values() if isinstance(value, Tensor)), torch.device("cpu"))
        with (
            self._watch.region("teacher", device),
            isolated(self._model_forward, self.isolation, kwargs) as inputs,
        ):
            backbone = causal_lm.run_backbone(self._slot, self._model_forward, inputs, measure=measure)
        if self.on_hidden is not None:
            self.on_hidden(backbone.hidden_states)
        if backbone.after_head is not None:
            self.head.after_head = backbone.after_head
        return self._give(backbone.hidden_states, kd_consumer)

    @uncompiled
    def _give(self, hidden_states: Tensor, consumer: Consumer) -> Tensor | None:
        causal_lm.still_there(self._slot, self.head.linear, "teacher")
        if not (consumer.needs_head or self.head.tied):  # a wrapper of both waits for both to have run
            return consumer.use_hidden(hidden_states)
        self._answer: Tensor | None = None
        if not is_replaced(self.head.linear):
            raise ValueError(
                "the forward of the teacher's head was replaced after attach(): put it back, or replace it before "
                "attach(), where it is judged by what it does"
            )
        answer = self._slot.module(hidden_states, consumer)
        if self._answer is None:
            raise ValueError(
                "a forward pre-hook on the teacher's head has dropped its second argument, so the loss was not "
                "computed: take it off, or put it on before attach(), where it is judged by what it does"
            )
        if answer.data_ptr() != self._answer.data_ptr():
            raise ValueError(
                "a forward hook on the teacher's head changes what it returns, which would be lost: take it off, or "
                "put it on before attach(), where it is judged by what it does"
            )
        return answer

    def _head_forward(self, hidden_states: Tensor, kd_consumer: Consumer | None = None) -> Tensor:
        if kd_consumer is None:
            return self._plain_head(hidden_states)
        after = self.head.after_head
        assert after is not None
        kd_consumer.use_head(teacher_head_forward(self.head.linear, hidden_states, after.transform, after.bias))
        self._answer = hidden_states.new_zeros(())
        return self._answer

    def _freeze(self, teacher: nn.Module) -> None:
        trainable = [p for p in teacher.parameters() if p.requires_grad]
        modes = [(module, module.training) for module in teacher.modules()]  # some may differ from the rest

        def restore() -> None:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training

        teacher.requires_grad_(False)
        teacher.eval()
        self._undo.append(restore)
