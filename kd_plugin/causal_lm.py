"""What is needed of a Hugging Face language model: its head, the hidden states it feeds it, and what it does
to the logits afterwards.

Notable decisions:
- hidden states come from the model's own forward, run with a stand-in where the head is: whatever a model does
  before its head (final norm, projection, width scaling, encoder and decoder) is done by the model itself;
- what it does after the head (scale, soft-cap, bias) is measured by feeding known logits through that same
  forward: attributes such as `logits_scaling` multiply in one architecture and divide in the next.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugin.row_kernels import LogitTransform

logger = logging.getLogger(__name__)

_PROBE_LIMIT = 60.0  # probe logits reach from -60 to 60, beyond any soft-cap in use
_SATURATING = 1e8


def unwrap(model: Any) -> nn.Module:
    """The Hugging Face model inside DDP, FSDP1, a DeepSpeed engine or torch.compile's wrapper."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


class HeadSlot(NamedTuple):
    """Where the head sits: `parent.<name>`."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The head that sits there now."""
        return self.parent._modules[self.name]

    def put(self, module: nn.Module) -> None:
        """Put another module in the head's place; its parameters are not touched."""
        self.parent._modules[self.name] = module


def find_head(model: nn.Module, side: str) -> HeadSlot:
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


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
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
    embedding = model.get_input_embeddings()
    return embedding is not None and embedding.weight is head.weight


class _StandIn(nn.Module):
    """Takes the head's place for one forward: keeps what the head would get, returns what it is told to."""

    def __init__(self, head: nn.Module, reply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._head = (head,)  # a tuple: not registered as a submodule
        self._reply = reply
        self.hidden_states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._head[0], name)  # models read e.g. lm_head.weight.dtype

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden_states = hidden_states
        return self._reply(hidden_states)


def _no_rows(hidden_states: Tensor) -> Tensor:
    """Logits without rows: whatever the model does to them costs nothing."""
    return hidden_states.new_empty(*hidden_states.shape[:-2], 0, 1)


def run_backbone(
    slot: HeadSlot,
    forward: Callable[..., Any],
    inputs: dict[str, Any],
    reply: Callable[[Tensor], Tensor] = _no_rows,
) -> tuple[Tensor, Any]:
    """Hidden states `[B, S, D]` that `forward(**inputs)` feeds its head, and its output.

    The head itself does not run: the model goes on with `reply(hidden states)` as its logits.
    """
    return _run_with_stand_in(slot, forward, inputs, reply)


def _accepts(forward: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@torch.compiler.disable(recursive=False)
def _run_with_stand_in(
    slot: HeadSlot, forward: Callable[..., Any], inputs: dict[str, Any], reply: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Any]:
    if _accepts(forward, "use_cache"):
        inputs = {**inputs, "use_cache": False}
    head = slot.module
    stand_in = _StandIn(head, reply)
    slot.put(stand_in)
    try:
        output = forward(**inputs)
    finally:
        slot.put(head)
    if stand_in.hidden_states is None:
        raise ValueError(f"{type(slot.parent).__name__}.forward never called its head {slot.name!r}: not supported")
    return stand_in.hidden_states, output


def logit_transform(model: nn.Module, slot: HeadSlot, side: str) -> tuple[LogitTransform, Tensor | None]:
    """What the model does between its head and its logits -> (scale and soft-cap, added bias `[V]` or None).

    Measured where the weights are present. Raises `ValueError` for anything but scale, soft-cap and bias.
    """
    declared = _declared_transform(model)
    inputs = _probe_inputs(model)
    if inputs is None or not _is_materialised(model):
        if declared != LogitTransform():
            logger.info("%s: %s taken from its configuration (weights not present)", side, declared)
        return declared, None
    vocab_size = slot.module.weight.shape[0]
    ramp = torch.linspace(-_PROBE_LIMIT, _PROBE_LIMIT, vocab_size)
    bias = _measure(model, slot, inputs, torch.zeros(vocab_size))
    shaped = _measure(model, slot, inputs, ramp) - bias
    if not bias.any():
        for transform in (LogitTransform(), declared, _fit(model, slot, inputs, ramp, shaped)):
            if torch.allclose(transform.apply(ramp), shaped, rtol=1e-4, atol=1e-4):
                return transform, None
    elif torch.allclose(ramp, shaped, rtol=1e-4, atol=1e-4):
        return LogitTransform(), bias
    raise ValueError(
        f"the {side} ({type(model).__name__}) changes its logits after the head by more than a scale, a tanh "
        "soft-cap or a bias: the loss would be computed on other logits than the model's; use DistillHead directly"
    )


def _measure(model: nn.Module, slot: HeadSlot, inputs: dict[str, Any], raw: Tensor) -> Tensor:
    """The model's logits `[V]` when its head returns `raw` `[V]`."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []

    def reply(hidden_states: Tensor) -> Tensor:
        return raw.to(hidden_states.device).expand(*hidden_states.shape[:-1], -1).clone()

    with torch.no_grad(), torch.random.fork_rng(devices):
        logits = _run_with_stand_in(slot, model.forward, inputs, reply)[1].logits
    return logits.reshape(-1, raw.numel())[-1].float().cpu()


def _fit(model: nn.Module, slot: HeadSlot, inputs: dict[str, Any], ramp: Tensor, shaped: Tensor) -> LogitTransform:
    """Scale from the largest value if linear, otherwise soft-cap from saturation and scale from the centre."""
    linear = LogitTransform(scale=float(shaped[-1] / ramp[-1]))
    if torch.allclose(linear.apply(ramp), shaped, rtol=1e-4, atol=1e-4):
        return linear
    cap = float(_measure(model, slot, inputs, torch.full_like(ramp, _SATURATING))[0])
    small = torch.full_like(ramp, 1e-3)
    return LogitTransform(scale=float(_measure(model, slot, inputs, small)[0]) / 1e-3, softcap=cap)


def _declared_transform(model: nn.Module) -> LogitTransform:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = getattr(text, "logit_scale", None)
    return LogitTransform(float(scale) if isinstance(scale, int | float) else 1.0, float(softcap) if softcap else None)


def _is_materialised(model: nn.Module) -> bool:
    """Whether a forward can run here and now: no meta tensors, nothing sharded or partitioned."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    return not any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in parameters)


def _probe_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Two tokens for any text model; None for models that read something else."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}
