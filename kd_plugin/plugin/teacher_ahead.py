"""The teacher ahead of its student: one forward over several micro-batches of an optimizer step.

A sharded teacher's weights are gathered once per forward, so a step of eight micro-batches gathers them once instead of
eight times, and each product is as much larger. What is kept from then on are the teacher's last hidden states
(`2 E` bytes a token in half precision), and a copy of its head where the exchange is `weight` and the head is not whole
on every rank: the head, too, is gathered once.

Notable decisions:
- micro-batches go together in the order in which they are given, so that ranks with the same number of them run the
  teacher equally often, whatever the lengths;
- of equal lengths they are laid one upon the other, and nothing else changes. Of unequal lengths they are padded on the
  right under an attention mask, which hidden states do not depend on but for rounding: in half precision as much as
  padding alone changes this model's, which is logged once. Not where attention has a window: one that holds nothing but
  padding has no softmax, and its NaN would spread;
- what is kept is found again by the tensors themselves: a forward with others runs the teacher, as without.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_plugin.distributed.torch_internals import times_written
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.plugin.head import teacher_head_forward
from kd_plugin.plugin.isolation import attention_of, windows_of
from kd_plugin.plugin.teacher_inputs import taken_from
from kd_plugin.plugin.teacher_side import NOT_FOR_TEACHER, TeacherSide

logger = logging.getLogger(__name__)

# Of each row by its place, so that rows of several micro-batches can be laid one upon the other.
_BY_ROW = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
_NOT_KEPT = NOT_FOR_TEACHER | {"labels", "shift_labels", "loss_rows", "token_weights"}
_NOT_KEPT |= {"num_items_in_batch", "soft_items_in_batch"}


class Kept(NamedTuple):
    """What the teacher has left for one micro-batch."""

    hidden: Tensor
    """`[B * S, E]`, without what was padded."""
    head: HeadTeacher | None
    """A copy of its head; None where the head is used in place, or by slices."""
    inputs: tuple[Tensor, ...]
    """The tensors by which it is found, which must not be freed before: an address could come back."""


class _Consumer:
    """Takes the hidden states of several micro-batches, and a copy of the head if it `needs_head`."""

    def __init__(self, *, needs_head: bool) -> None:
        self.needs_head = needs_head
        self.hidden: Tensor
        self.head: HeadTeacher | None = None

    def use_head(self, teacher: HeadTeacher) -> None:
        """Called inside the head's forward; a wrapper that gathers both calls it also where the head is not needed."""
        self.hidden = teacher.hidden
        if self.needs_head:
            empty = teacher.reading(teacher.hidden[:0])  # the copy lives longer than these hidden states
            self.head = empty.vocab_slice(0, teacher.vocab_size)

    def use_hidden(self, hidden: Tensor) -> None:
        """Called instead, where the head does not run."""
        self.hidden = hidden.reshape(-1, hidden.shape[-1])


class TeacherAhead:
    """Runs a teacher ahead, and has what it left until that is asked for."""

    def __init__(self, side: TeacherSide) -> None:
        self._side = side
        self._kept: dict[Hashable, Kept] = {}
        self._warned = self._padded = False

    def run(
        self, teacher: nn.Module, micro_batches: Sequence[Mapping[str, Any]], together: int, *, whole_head: bool
    ) -> None:
        """One teacher forward for each `together` of the micro-batches; what it leaves is kept.

        Args:
            teacher: what to call for the teacher, such as the wrapper around it.
            micro_batches: keyword arguments of the student's forwards to come.
            together: how many at most, 1 or more.
            whole_head: whether those forwards use the teacher's head whole (`exchange: weight`).

        Raises:
            ValueError: an encoder-decoder, whose inputs are partly made of labels; inputs other than `input_ids`,
                `attention_mask`, `position_ids` and `token_type_ids` of shape `[B, S]` where several micro-batches go
                together, or micro-batches with different ones.
        """
        if getattr(self._side.model.config, "is_encoder_decoder", False):
            raise ValueError("teacher_ahead is for decoders: an encoder-decoder makes part of its inputs of its labels")
        given = [_for_teacher(batch) for batch in micro_batches]
        if any(not isinstance(batch.get("input_ids"), Tensor) for batch in given):
            raise ValueError("teacher_ahead wants the student's keyword arguments, input_ids [B, S] among them")
        head, copied = None, whole_head and not self._side.head.is_usable_in_place()
        for start in range(0, len(given), together):
            batches = given[start : start + together]
            inputs, length = _merged(batches, self._side.model, by_bounds=self._side.isolation == "varlen")
            self._tell_of_padding(batches)
            self._side.look_again(inputs)
            consumer = _Consumer(needs_head=copied and head is None)  # one copy serves the whole step
            self._side.run(teacher, inputs, consumer)
            head = consumer.head or head
            self._keep(batches, consumer.hidden, length, head)

    def take(self, inputs: Mapping[str, Any]) -> Kept | None:
        """What the teacher has left for a forward with these inputs; None if it has to run. Each is taken once."""
        if not self._kept:  # as in every step whose teacher has not run ahead
            return None
        kept = self._kept.pop(_key(_for_teacher(inputs)), None)
        if kept is None and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            logger.warning(
                "the teacher has run ahead for other tensors than this forward's, and runs again: give the student the "
                "very tensors that plugin.teacher_ahead was given"
            )
        return kept

    def _tell_of_padding(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Say once that micro-batches of other lengths are not read as they would be alone, bit for bit."""
        lengths, dtype = {batch["input_ids"].shape[1] for batch in batches}, self._side.head.linear.weight.dtype
        if len(lengths) > 1 and not self._padded:
            self._padded = True
            logger.info(
                "the teacher reads micro-batches of %d to %d tokens ahead, padded together in %s: its hidden states "
                "differ from those of each alone as far as padding changes them, by rounding",
                *(min(lengths), max(lengths), str(dtype).removeprefix("torch.")),
            )

    @property
    def has_more(self) -> bool:
        """Whether something is kept."""
        return bool(self._kept)

    def forget(self) -> None:
        """Let go of all that is kept."""
        self._kept.clear()

    def source(self, kept: Kept) -> HeadTeacher:
        """The teacher of a micro-batch, with its head whole."""
        if kept.head is not None:
            return kept.head.reading(kept.hidden)
        head = self._side.head
        assert head.after_head is not None
        return teacher_head_forward(head.linear, kept.hidden, head.after_head.transform, head.after_head.bias)

    def _keep(
        self, batches: Sequence[Mapping[str, Any]], hidden: Tensor, length: int, head: HeadTeacher | None
    ) -> None:
        """Hand out the hidden states `[B * length, E]` of all sequences to the micro-batches that they are of."""
        sizes = [len(batch["input_ids"]) for batch in batches]
        for batch, part in zip(batches, hidden.reshape(sum(sizes), length, -1).split(sizes), strict=True):
            own = part[:, : batch["input_ids"].shape[1]].reshape(-1, part.shape[-1])
            tensors = tuple(value for value in batch.values() if isinstance(value, Tensor))
            self._kept[_key(batch)] = Kept(own, head, tensors)


def _for_teacher(inputs: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in inputs.items() if name not in _NOT_KEPT}
    own = taken_from(given)
    return given if own is None else own.inputs


def _key(inputs: Mapping[str, Any]) -> Hashable:
    """What says that a forward is about the same tensors, unchanged."""

    def told(value: object) -> Hashable:
        if isinstance(value, Tensor):
            return value.data_ptr(), tuple(value.shape), times_written(value)
        return repr(value)

    return tuple(sorted((name, told(value)) for name, value in inputs.items() if value is not None))


def _merged(batches: Sequence[Mapping[str, Any]], model: nn.Module, *, by_bounds: bool) -> tuple[dict[str, Any], int]:
    """The inputs of one forward over all of `batches`, and its length S.

    `by_bounds` says that flash attention is given the bounds of documents, whatever the positions.

    Raises:
        ValueError: inputs that differ by name, or that are not by row.
    """
    first = batches[0]
    if len(batches) == 1:
        return dict(first), first["input_ids"].shape[1]
    names = {frozenset(name for name, value in batch.items() if value is not None) for batch in batches}
    if len(names) > 1:
        listed = "; ".join(", ".join(sorted(each)) for each in names)
        raise ValueError(f"micro-batches for the teacher have different inputs ({listed}): give each the same")
    (common,) = names
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    length, padded = max(lengths), len(lengths) > 1
    by_positions = "flash" in attention_of(model) and not by_bounds
    for name in common:
        if name not in _BY_ROW or (name == "position_ids" and by_positions):
            raise ValueError(
                f"the teacher cannot run ahead over several micro-batches with {name}"
                + (" under flash attention, which takes it for the places of packed sequences" * (name in _BY_ROW))
                + ": run it with each (together=1)"
            )
    merged = {name: torch.cat([_padded(batch, name, length) for batch in batches]) for name in common}
    if padded and (windows := windows_of(model)):
        raise ValueError(
            f"the teacher cannot run ahead over micro-batches of {', '.join(map(str, sorted(lengths)))} tokens: its "
            f"attention has a window ({next(iter(windows))}), which may hold nothing but padding: give micro-batches "
            "of one length, or run it with each (together=1)"
        )
    if padded and "position_ids" in common and "attention_mask" not in common:
        raise ValueError(
            f"the teacher cannot run ahead over micro-batches of {', '.join(map(str, sorted(lengths)))} tokens with "
            "position_ids: the mask of their padding would join the documents of packed sequences: give micro-batches "
            "of one length, or run it with each (together=1)"
        )
    if padded and "attention_mask" not in common:
        masks = [_padded({"mask": torch.ones_like(batch["input_ids"])}, "mask", length) for batch in batches]
        merged["attention_mask"] = torch.cat(masks)
    return merged, length


def _padded(batch: Mapping[str, Any], name: str, length: int) -> Tensor:
    value = batch[name]
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise ValueError(f"the teacher cannot run ahead over several micro-batches: {name} is not of shape [B, S]")
    return F.pad(value, (0, length - value.shape[1]))
