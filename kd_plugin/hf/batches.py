"""The batches that a trainer gives its student: labels as they are counted, rows that are there twice, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.plugin.causal_lm import unwrap_model
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX, Convention, decoder_input_ids
from kd_plugin.plugin.soft_rows import soft_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_plugin.plugin.attach import Plugin

LABELS = ("labels", "shift_labels")


def counted_as_read(batch: dict[str, Any], convention: Convention | None) -> dict[str, Any]:
    """`batch` with labels that the Trainer counts as the student reads them: without those that a mask hides."""
    if convention is None or not convention.masked or not {"labels", "attention_mask"} <= batch.keys():
        return batch
    return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, OWN_IGNORE_INDEX)}


def soft_rows_of(batch: Mapping[str, Any], plugin: Plugin) -> Tensor:
    """The rows of a labelled batch that the soft loss counts on with `soft_on: all`, bool `[B, S]`."""
    ignored, model = plugin.config.ignore_index, unwrap_model(plugin.student)
    labels = {name: batch.get(name) for name in LABELS}
    targets = plugin.labels.targets(dict(batch), **labels, ignore_index=ignored, vocab_size=None)
    return soft_rows(batch, targets, ignored, model)


def count_soft_rows(found: Sequence[Mapping[str, Any]], trainer: Any, device: torch.device) -> Tensor | int:
    """Rows of the soft loss in a step's micro-batches, over the ranks over which the Trainer counts its labels."""
    count = torch.stack([soft_rows_of(batch, trainer.plugin).sum() for batch in found]).sum()
    args = trainer.args
    if args.average_tokens_across_devices and args.world_size > 1:
        return trainer.accelerator.gather(count.to(device)).sum()
    return count


def without_repeats(batch: Mapping[str, Any], accelerator: Accelerator, plugin: Plugin | None = None) -> dict[str, Any]:
    """An evaluation's batch in which no row counts twice.

    accelerate fills the last batch of several ranks with rows of the beginning, which it takes out of what it gathers;
    here their labels (`[B, S]`) become -100, and a soft loss of `plugin` on all tokens is asked for on the rows of the
    others alone.
    """
    state, batch = accelerator.gradient_state, dict(batch)
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    given = {name: labels for name in LABELS if isinstance(labels := batch.get(name), Tensor)}
    rows = None
    if given and plugin is not None and plugin.config.soft_everywhere:
        rows = soft_rows_of(batch, plugin)

    def taken_out(values: Tensor, instead: int) -> Tensor:
        first = accelerator.process_index * len(values)
        repeated = torch.arange(first, first + len(values), device=values.device) >= state.remainder
        return values.masked_fill(repeated.view(-1, *[1] * (values.dim() - 1)), instead)

    batch |= {name: taken_out(labels, OWN_IGNORE_INDEX) for name, labels in given.items()}
    return batch if rows is None else batch | {"loss_rows": taken_out(rows, 0).flatten().nonzero().flatten()}


def without_labels(batch: Mapping[str, Any], student: nn.Module, convention: Convention | None) -> dict[str, Any]:
    """What the student is called with for its logits; an encoder-decoder's inputs are made of the labels."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    model = unwrap_model(student)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        made = convention or Convention(shift=False)
        inputs["decoder_input_ids"] = decoder_input_ids(model, batch["labels"], made, OWN_IGNORE_INDEX)
    return inputs
