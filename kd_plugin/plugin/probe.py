"""One small forward of a model at `attach`: what it does to its logits, and how it reads its labels.

Notable decisions:
- a stand-in in the head's place returns known logits, so what is learnt does not depend on the weights, and a model
  that has just been initialised tells as much as a trained one;
- the same rows stand in several places of the batch: what depends on the place, or on the hidden states, is noticed;
- a second look, at padding, start and end tokens and, of a student, in training mode, must show the same: what a model
  does there only (label smoothing, a cap of its logits) would otherwise be lost for the whole training;
- a model that cannot run here and now (weights on meta, partitioned, sharded; other inputs than text) is not an
  error: its logits are measured in its first real forward (see `causal_lm.run_backbone`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugin.distributed.layout import is_dtensor, is_fsdp_unit, is_zero3
from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin.causal_lm import HeadCallsError, HeadSlot, accepts, run_with_stand_in
from kd_plugin.plugin.labels import DECODER_INPUTS, Convention, learn_shift
from kd_plugin.plugin.logit_probe import LogitsChanged
from kd_plugin.plugin.probe_batch import (
    LENGTH,
    KnownLogits,
    consistent,
    labels_of,
    own_loss_of,
    plain_tokens,
    reason_of,
    whole_call,
)
from kd_plugin.plugin.second_look import second_look
from kd_plugin.plugin.undisturbed import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Observed(NamedTuple):
    """What a model showed; None where it could not."""

    after_head: AfterHead | None = None
    convention: Convention | None = None
    why: str = ""
    """Why not, for a message."""
    contradicts: bool = False
    """Whether its own loss was seen, and follows no known convention."""
    adds: bool = False
    """Whether it adds something to the cross-entropy of its labels, such as a router loss."""


def observe(model: PreTrainedModel, slot: HeadSlot, side: str) -> Observed:
    """Run `model` on a few tokens with a stand-in for its head; it is left as it was.

    Raises:
        LogitsChanged: it changes its logits in a way that the loss cannot follow.
        HeadCallsError: it makes its logits without its head, or with several calls of it.
        LabelError: a student's own loss is another in training mode, or of padding and the like, than of plain tokens.
    """
    if (why := _cannot_run(model)) is not None:
        return Observed(why=why)
    with undisturbed(model), torch.enable_grad():  # with gradients, so that trainable parameters show
        try:
            observed = _look(model, slot, side)
        except (HeadCallsError, LogitsChanged):
            raise
        except Exception as error:  # whatever a model says of inputs that it was not made for
            return Observed(why=f"a forward on {LENGTH} tokens failed with {reason_of(error)}")
        second = second_look(model, slot, side, observed.after_head, observed.convention)
        return observed._replace(convention=second.convention, adds=observed.adds or second.adds)


def _look(model: PreTrainedModel, slot: HeadSlot, side: str) -> Observed:
    vocab_size = slot.vocab_size
    known, tokens = KnownLogits(vocab_size).reply, plain_tokens(model, vocab_size)
    labels, inputs = labels_of(tokens), {"input_ids": tokens}
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    run = functools.partial(run_with_stand_in, slot, whole_call(model))
    after_head_of = functools.partial(consistent, vocab_size=vocab_size, model=model, side=side)
    if not accepts(model.forward, "labels"):
        inputs |= {"decoder_input_ids": tokens} if encoder_decoder else {}
        return Observed(after_head_of(run(inputs, known)[1].logits), why="it takes no labels")
    labelled = {**inputs, "labels": labels}
    try:
        hidden, output = run(labelled, known)
    except HeadCallsError:  # fused losses read the head's weight; without labels the head must be called all the same
        if encoder_decoder:
            raise
        return Observed(after_head_of(run(inputs, known)[1].logits), why="its own loss does not call its head")
    after = after_head_of(output.logits)
    first = own_loss_of(output, labels)
    if first is None:
        return Observed(after, why="it computes no loss of labels")
    again = functools.partial(run, labelled, KnownLogits(vocab_size, seed=1).reply)
    shift, adds = learn_shift(first, lambda: own_loss_of(again()[1], labels))
    if shift is None:
        return Observed(
            after,
            why=f"the own loss of {type(model).__name__} is not the mean cross-entropy of its logits, neither with "
            "labels shifted by one nor as they are",
            contradicts=True,
        )
    made = _decoder_inputs(model, slot, inputs, labels, hidden) if encoder_decoder else None
    return Observed(after, Convention(shift, made), adds=adds)


def _cannot_run(model: nn.Module) -> str | None:
    """Why a forward cannot run here and now, on this rank alone; None if it can."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return f"it reads {model.main_input_name}"
    if any(is_fsdp_unit(module) for module in model.modules()):
        return "it is sharded by FSDP already"
    brought: set[int] = set()  # what accelerate's hooks bring for the time of a module's forward
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            brought.update(id(p) for p in module.parameters())
    for parameter in model.parameters():
        if is_dtensor(parameter):
            return "it is sharded already"
        if parameter.is_meta and id(parameter) not in brought:
            return "its weights are on the meta device"
        if parameter.numel() == 0 and is_zero3(parameter):
            return "its weights are partitioned by zero.Init"
        if parameter.numel() == 0 and parameter.dim() < 2:  # some layers of some models have no columns
            return "a wrapper has taken its weights away"
    return None


def _decoder_inputs(
    model: PreTrainedModel, slot: HeadSlot, inputs: dict[str, Tensor], labels: Tensor, hidden: Tensor
) -> str | None:
    """The way to make decoder inputs of labels that gives the decoder's `hidden` states `[2, 8, D]`, if any does."""
    known = KnownLogits(slot.vocab_size)
    for name, make in DECODER_INPUTS.items():
        try:
            ids = make(model, labels.clone())
            again, _ = run_with_stand_in(slot, whole_call(model), {**inputs, "decoder_input_ids": ids}, known.reply)
        except Exception:  # the configuration lacks what this way needs
            continue
        if again.shape == hidden.shape and torch.allclose(again.float(), hidden.float(), rtol=1e-3, atol=1e-5):
            return name
    return None
