"""What follows the loss in one forward of an attached student: one division, and Hugging Face's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import all_reduce, num_ranks
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss.output import divisor
from kd_plugin.loss.split import Number

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

# What one model has computed, and the other would take for its own or go without.
_OF_ONE_MODEL = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")


def check_readable(inputs: Mapping[str, object]) -> None:
    """Raise `ValueError` for inputs of the student from which the teacher would compute something else."""
    unreadable = [name for name in _OF_ONE_MODEL if inputs.get(name) is not None]
    if unreadable:
        raise ValueError(
            f"the student got {', '.join(unreadable)}, which the teacher cannot read: pass input_ids (and "
            "decoder_input_ids), from which each model makes its own"
        )


@uncompiled  # counts over the ranks, which a compiled student leaves to eager code
def per_item(
    loss_sum: Tensor,
    num_valid: Tensor,
    num_items: Number | None,
    group: dist.ProcessGroup | None,
    group_rows: int | None = None,
    known: tuple[Number, int] | None = None,
) -> Tensor:
    """Divide by `num_items`; without it, count over all ranks and undo the wrapper's averaging over them.

    `known` is what to divide by, and the ranks to multiply by, where that is known before; `group_rows` is the count,
    where the ranks of `group` have told each other already. Without gradients there is no averaging to undo, and a rank
    may be alone: it is the mean over this rank's tokens.
    """
    if known is not None:
        return loss_sum * known[1] / known[0]
    if num_items is not None:
        items = divisor(num_items, 0)
        return loss_sum / (items.to(loss_sum.device) if isinstance(items, Tensor) else items)
    ranks = num_ranks(group)
    if not torch.is_grad_enabled():
        return loss_sum / num_valid.clamp_min(1)
    if group_rows is not None:
        return loss_sum * ranks / max(group_rows, 1)
    valid = num_valid.clone()
    if ranks > 1:
        all_reduce(valid, group, "numbers of valid tokens (pass num_items_in_batch, and it is not needed)")
    return loss_sum * ranks / valid.clamp_min(1)


def model_output(loss: Tensor, own_output: Any, model_config: object) -> ModelOutput:
    """The loss in the class of the model's own output, or in the usual one where that has no loss."""
    from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
    from transformers.utils.generic import ModelOutput

    kind = type(own_output)
    if isinstance(own_output, ModelOutput) and "loss" in kind.__dataclass_fields__:
        try:
            return kind(loss=loss)
        except TypeError:  # other fields are required
            pass
    encoder_decoder = getattr(model_config, "is_encoder_decoder", False)
    return (Seq2SeqLMOutput if encoder_decoder else CausalLMOutputWithPast)(loss=loss)
