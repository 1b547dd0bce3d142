"""The layers of a student that multiply by a whole head, plain or inside a wrapper of peft, and what takes their place.

Notable decisions:
- the modules stay where and what they are; only the linear layers that multiply by a whole head become a `DistillHead`;
- what an adapter adds is known to `lora`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kd_plugin.loss import checks
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.plugin import lora
from kd_plugin.plugin.causal_lm import HeadSlot
from kd_plugin.plugin.head import DistillHead


def check_student(model: nn.Module, slot: HeadSlot) -> None:
    """Refuse a student that the loss cannot take over.

    Raises:
        ValueError: prompt tuning; a head that is not linear, quantised, sharded already, attached already, or
            adapted in another way than by LoRA.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"the student is adapted by {config.peft_type.value}, whose virtual tokens have no labels and are unknown "
            "to the teacher; wanted LoRA: peft.get_peft_model(student, peft.LoraConfig(...))"
        )
    for layer in _linear_layers(slot)[0]:
        checks.linear_head("the student's head", layer.module)
        if isinstance(layer.module, DistillHead):
            raise ValueError("this student has a teacher attached already: call plugin.detach() first")


def replace_head(slot: HeadSlot, distilling: Callable[[nn.Linear], DistillHead]) -> list[Callable[[], None]]:
    """Make the student's head compute the loss when it is called with a `HeadCall`.

    Args:
        slot: where the model has its head, peft's wrapper around it included; `check_student` accepts it.
        distilling: turns a linear layer into the head that takes its place.

    Returns:
        What undoes it, to be called from last to first.
    """
    layers, adapted = _linear_layers(slot)
    undo = [_put(layer, distilling(checks.linear_head("the student's head", layer.module))) for layer in layers]
    if adapted:
        undo += lora.take_over_adapter(slot.module)
    return undo


def _linear_layers(slot: HeadSlot) -> tuple[list[HeadSlot], bool]:
    """The layers that may multiply by a whole head, and whether they lie inside a LoRA adapter."""
    head = slot.module
    if not type(head).__module__.startswith("peft."):
        return [slot], False
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if type(head) is LoraLinear:
        lora.active_adapters(head)  # refuses those that are not a low-rank term
        return [HeadSlot(head, "base_layer")], True
    if type(head) is ModulesToSaveWrapper:
        copies = [HeadSlot(head.modules_to_save, name) for name in head.modules_to_save]
        return [HeadSlot(head, "original_module"), *copies], False
    raise ValueError(
        f"the student's head is a {type(head).__module__}.{type(head).__qualname__}; wanted plain LoRA or "
        "modules_to_save on a float torch.nn.Linear: leave the head out of target_modules (and of "
        "trainable_token_indices), or merge the adapter before attach()"
    )


def _put(slot: HeadSlot, head: DistillHead) -> Callable[[], None]:
    original = slot.module

    def restore() -> None:
        original.train(head.training)
        for parent in slot.parent.modules():  # a wrapper may have come between
            for name, child in parent._modules.items():
                if child is head:
                    parent._modules[name] = original

    slot.put(head)
    return restore


def on_slice(head: Any, hidden: Tensor, call: HeadCall) -> Tensor:
    """The loss on the vocabulary slice of the student's head that FSDP2 left here, peft's adapters included."""
    return lora.on_slice(head, hidden, call) if hasattr(head, "base_layer") else head.on_slice(hidden, call)
