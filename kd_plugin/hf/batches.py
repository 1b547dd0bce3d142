"""The batches that a trainer gives its student: labels as they are counted, rows that are there twice, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.plugin.causal_lm import unwrap_model
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX, Convention, decoder_input_ids

if TYPE_CHECKING:
    from accelerate import Accelerator

LABELS = ("labels", "shift_labels")


def counted_as_read(batch: dict[str, Any], convention: Convention | None) -> dict[str, Any]:
    """`batch` with labels that the Trainer counts as the student reads them: without those that a mask hides."""
    if convention is None or not convention.masked or not {"labels", "attention_mask"} <= batch.keys():
        return batch
    return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, OWN_IGNORE_INDEX)}


def without_repeats(batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """An evaluation's batch in which no row counts twice.

    accelerate fills the last batch of several ranks with rows of the beginning, which it takes out of what it gathers;
    here their labels (`[B, S]`) become -100.
    """
    state, batch = accelerator.gradient_state, dict(batch)
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    for name in LABELS:
        if isinstance(labels := batch.get(name), Tensor):
            first = accelerator.process_index * len(labels)
            repeated = torch.arange(first, first + len(labels), device=labels.device) >= state.remainder
            batch[name] = labels.masked_fill(repeated.view(-1, *[1] * (labels.dim() - 1)), OWN_IGNORE_INDEX)
    return batch


def without_labels(batch: Mapping[str, Any], student: nn.Module, convention: Convention | None) -> dict[str, Any]:
    """What the student is called with for its logits; an encoder-decoder's inputs are made of the labels."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    model = unwrap_model(student)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        made = convention or Convention(shift=False)
        inputs["decoder_input_ids"] = decoder_input_ids(model, batch["labels"], made, OWN_IGNORE_INDEX)
    return inputs
