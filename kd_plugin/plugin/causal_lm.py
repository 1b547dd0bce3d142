"""What is needed of a Hugging Face language model: its head, and the hidden states that it feeds it.

Notable decisions:
- hidden states come from the model's own forward, run with a stand-in where the head is: whatever a model does
  before its head (final norm, projection, width scaling, encoder and decoder) is done by the model itself;
- what it does after the head shows in what it makes of the stand-in's reply (see `logit_probe`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kd_plugin.distributed.compiler_internals import original_of_compiled
from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin.logit_probe import NUM_ROWS, LogitsChanged, after_head, changed_by_place, known_rows, other_size
from kd_plugin.plugin.token_ids import input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadCallsError(ValueError):
    """A model makes its logits without its head, or with several calls of it."""


def unwrap(model: Any) -> nn.Module:
    """The Hugging Face model inside DDP, FSDP1, a DeepSpeed engine or torch.compile's wrapper."""
    while True:
        if (original := original_of_compiled(model)) is not None:
            model = original
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """`unwrap`, for a model that has to be one of Transformers; what it lacks shows where that is used."""
    return cast("PreTrainedModel", unwrap(model))


class HeadSlot(NamedTuple):
    """Where the head sits: `parent.<name>`."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The head that sits there now."""
        module = self.parent._modules[self.name]
        assert module is not None
        return module

    @property
    def vocab_size(self) -> int:
        """Token ids of the head that sits there now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def put(self, module: nn.Module) -> None:
        """Put another module in the head's place; its parameters are not touched."""
        self.parent._modules[self.name] = module


def find_head(model: PreTrainedModel, side: str) -> HeadSlot:
    """The output head, whatever wraps it. Raises `ValueError` for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(model, "config"):
        raise ValueError(
            f"the {side} ({type(model).__name__}) has no output head: wanted a causal language model or "
            "encoder-decoder such as AutoModelForCausalLM loads, not its backbone alone"
        )
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is head:
                return HeadSlot(parent, name)
    raise ValueError(f"the {side}'s head is not among its modules ({type(model).__name__}): unwrap the model first")


def still_there(slot: HeadSlot, head: nn.Module, side: str) -> None:
    """Raise `ValueError` if the head that was attached is no longer in its place, nor inside what is."""
    if slot.module is not head and all(module is not head for module in slot.module.modules()):
        raise ValueError(
            f"the {side}'s head was replaced after attach(), as resize_token_embeddings and set_output_embeddings do: "
            "call plugin.detach() and attach() again; better, change the head first"
        )


def check_apart(student: PreTrainedModel, teacher: nn.Module) -> None:
    """Refuse a teacher that would train with the student, or a student that would be frozen with the teacher."""
    if teacher is student:
        raise ValueError("student and teacher are one model: pass copy.deepcopy(student) as the teacher")
    held = {id(parameter) for parameter in teacher.parameters()}
    inside = next((name for name, module in student.named_modules() if module is teacher), None)
    if inside is not None:
        head = find_head(student, "student").module
        if any(id(parameter) in held for parameter in head.parameters()):  # a peft model's base
            raise ValueError("the teacher is a part of the student and would train with it: load the teacher by itself")
    own = student.named_parameters(remove_duplicate=False)
    own = ((name, p) for name, p in own if inside is None or not name.startswith(f"{inside}."))
    shared = [name for name, p in own if p.requires_grad and id(p) in held]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameter(s), such as {shared[0]}, which would be frozen with "
            "the teacher: copy.deepcopy the layers that the student takes over"
        )


def is_tied(model: nn.Module, head: nn.Module) -> bool:
    """Whether the head's weight is the input embedding's."""
    return getattr(input_embeddings(model), "weight", None) is head.weight  # some embeddings hold several tables


class _StandIn(nn.Module):
    """Takes the head's place for one forward: keeps what the head would get, returns what it is told to."""

    def __init__(self, head: nn.Module, reply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._head = (head,)  # a tuple: not registered as a submodule
        self._reply = reply
        self.hidden_states: Tensor | None = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._head[0], name)  # models read e.g. lm_head.weight.dtype

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden_states = hidden_states
        self.calls += 1
        return self._reply(hidden_states)


def _no_rows(hidden_states: Tensor) -> Tensor:
    """Logits without rows: whatever the model does to them costs nothing."""
    return hidden_states.new_empty(*hidden_states.shape[:-2], 0, 1)


def _without_weights(model: nn.Module) -> ValueError:
    return ValueError(
        f"weights of the {type(model).__name__} are still on the meta device: load them before the first step "
        "(to_empty and load_state_dict, or from_pretrained)"
    )


class Backbone(NamedTuple):
    """What a model's forward gave without its head."""

    hidden_states: Tensor  # [B, S, D], what the head would be given
    output: Any
    """Hugging Face's output, its logits without rows."""
    after_head: AfterHead | None = None
    """What happens to the logits after the head, where that was asked for."""


@torch.compiler.disable(recursive=False)
def run_backbone(
    slot: HeadSlot, forward: Callable[..., Any], inputs: dict[str, Any], *, measure: tuple[int, str] | None = None
) -> Backbone:
    """Run `forward(**inputs)` up to the head, which itself does not run.

    Args:
        slot: where the head is.
        forward: of the model that holds it.
        inputs: without labels.
        measure: the size of the vocabulary and the side's name, to learn from the same run what the model does to
            its logits after the head; for a model whose weights were not there at `attach`.

    Raises:
        ValueError: the head was called never or more than once; `LogitsChanged`, when measuring.
    """
    if measure is None:
        return Backbone(*run_with_stand_in(slot, forward, inputs, _no_rows))
    vocab_size, side = measure

    def known(hidden_states: Tensor) -> Tensor:
        rows = known_rows(vocab_size).to(hidden_states.device)
        return rows.expand(*hidden_states.shape[:-2], -1, -1).clone()

    hidden_states, output = run_with_stand_in(slot, forward, inputs, known)
    return Backbone(hidden_states, output, _after_known(output, slot.parent, vocab_size, side))


def _after_known(output: object, model: nn.Module, vocab_size: int, side: str) -> AfterHead:
    """What the model did to the known rows of each sequence, the same in all."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise no_logits(model, side)
    if logits.shape[-1] != vocab_size:
        raise other_size(model, side, vocab_size, logits.shape[-1])
    each = logits.reshape(-1, NUM_ROWS, vocab_size)
    if not logits.is_meta and not torch.allclose(each[0], each[-1], rtol=1e-3, atol=1e-3):
        raise changed_by_place(model, side)
    return after_head(each[0], model, side)


def no_logits(model: nn.Module, side: str) -> LogitsChanged:
    """The error about an output without logits where they are to be measured."""
    return LogitsChanged(
        f"the {side} ({type(model).__name__}) returns no logits (return_dict=False?), so what it does to them after "
        "the head cannot be measured: attach while its weights are present"
    )


def accepts(forward: Callable[..., Any], name: str) -> bool:
    """Whether a forward takes an argument of this name."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@torch.compiler.disable(recursive=False)
def run_with_stand_in(
    slot: HeadSlot, forward: Callable[..., Any], inputs: dict[str, Any], reply: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Any]:
    """Hidden states and output of `forward(**inputs)`, whose head returns `reply(hidden states)`."""
    if accepts(forward, "use_cache"):
        inputs = {**inputs, "use_cache": False}
    head = slot.module
    stand_in = _StandIn(head, reply)
    slot.put(stand_in)
    try:
        output = forward(**inputs)
    except (RuntimeError, NotImplementedError) as error:
        if any(parameter.is_meta for parameter in slot.parent.parameters()):
            raise _without_weights(slot.parent) from error
        raise
    finally:
        slot.put(head)
    if stand_in.hidden_states is not None and stand_in.hidden_states.is_meta:
        raise _without_weights(slot.parent)
    if stand_in.hidden_states is None:
        raise HeadCallsError(f"{type(slot.parent).__name__}.forward never called its head {slot.name!r}: not supported")
    if stand_in.calls > 1:
        raise HeadCallsError(
            f"{type(slot.parent).__name__}.forward called its head {slot.name!r} {stand_in.calls} times: not supported"
        )
    return stand_in.hidden_states, output
