"""The rows that the soft loss counts on with `distill.soft_on: all`, and what the two losses are then divided by.

Notable decisions:
- row s counts if the tokens s and s + 1 are both real and stand in one document: `attention_mask` is not 0 and equal
  for both (some packers number documents in it), and positions go up from one to the other. A row with a label counts
  in any case, and one whose next token stands for an image or a sound does not;
- where nothing says which tokens are padding, the call is refused: a batch of one sequence with positions alone is
  taken to be packed without padding, as collators for flash attention make it;
- `num_items_in_batch` is the number of labels, as the Hugging Face Trainer counts it. It says nothing of the rows of
  the soft loss, whose number has to come with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugin.distributed.collectives import all_reduce, num_ranks
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss import checks
from kd_plugin.loss.chunk_loop import wide_dtype
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.output import Items, divisor
from kd_plugin.loss.split import Number, check_items
from kd_plugin.plugin.teacher_inputs import TeacherReads
from kd_plugin.plugin.token_ids import replaced_ids
from kd_plugin.settings.distill import DistillConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from kd_plugin.plugin.labels import Convention

__all__ = ["Given", "SoftRowsError", "call_of", "check_convention", "known_items", "soft_items_of", "soft_rows"]

_OTHER_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class SoftRowsError(ValueError):
    """The rows of the soft loss cannot be known."""


class Given(NamedTuple):
    """What a caller says of the rows that count."""

    loss_rows: Tensor | None = None
    """`[n]`, flat indices."""
    token_weights: Tensor | None = None
    """`[B, S]`, by row."""
    num_items: Number | None = None
    """Labelled rows of the whole step over all ranks."""
    soft_items: Number | None = None
    """Rows of the soft loss, likewise."""
    teacher: TeacherReads | None = None
    """What the teacher reads, where that is not what the student reads."""

    def read_by_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The teacher's inputs, if the student's are `inputs`."""
        return inputs if self.teacher is None else self.teacher.inputs


def check_convention(config: DistillConfig, convention: Convention | None, model: nn.Module) -> None:
    """Refuse, with `soft_on: all`, a student that does not predict the token after each place.

    Raises:
        SoftRowsError: an encoder-decoder or a masked language model.
    """
    encodes = getattr(model.config, "is_encoder_decoder", False)
    if config.soft_everywhere and (encodes or (convention is not None and not convention.shift)):
        raise SoftRowsError(
            f"distill.soft_on is all, for causal language models, and {type(model).__name__} does not predict the "
            "token after each place: set distill.soft_on to trained"
        )


def soft_items_of(config: DistillConfig, number: int) -> dict[str, Any]:
    """The argument of a forward that says how many rows the soft loss has in its step; none where it asks for none."""
    return {"soft_items_in_batch": number} if config.soft_everywhere else {}


@uncompiled
def soft_rows(inputs: Mapping[str, Any], targets: Tensor, ignore_index: int, model: nn.Module) -> Tensor:
    """The rows of the soft loss, bool `[B, S]`.

    Args:
        inputs: of the student's forward: `input_ids`, and `attention_mask` or `position_ids`, `[B, S]` each.
        targets: `[B, S]`, the label of each row.
        ignore_index: the label of rows without one.
        model: the student, without wrappers.

    Raises:
        SoftRowsError: which tokens are padding, or where documents begin, is not said in a form that is known.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.shape != targets.shape:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else "missing"
        raise SoftRowsError(f"distill.soft_on all: input_ids is {found}; wanted {tuple(targets.shape)}, as the labels")
    positions = _positions(inputs, ids)
    if mask is None and (positions is None or ids.shape[0] != 1):
        raise SoftRowsError(
            "distill.soft_on all: without attention_mask it is not known which tokens are padding: pass it, [B, S] "
            "(torch.ones_like(input_ids) where there is none), or loss_rows, the flat indices of the soft loss's rows"
        )
    follows = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SoftRowsError(f"distill.soft_on all: attention_mask is {found}; wanted {tuple(ids.shape)}")
        follows &= (mask[:, 1:] != 0) & (mask[:, 1:] == mask[:, :-1])
    if positions is not None:
        follows &= positions[:, 1:] > positions[:, :-1]
    for other in replaced_ids(model):
        follows &= ids[:, 1:] != other
    return F.pad(follows, (0, 1)) | (targets != ignore_index)


def _positions(inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    positions = inputs.get("position_ids")
    if positions is None:
        bounds = [name for name in _OTHER_BOUNDS if inputs.get(name) is not None]
        if bounds:
            raise SoftRowsError(
                f"distill.soft_on all: {bounds[0]} without position_ids does not say where documents begin: pass "
                "position_ids [B, S], from 0 in each document"
            )
        return None
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[-1] != ids.shape[-1]:
        found = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise SoftRowsError(f"distill.soft_on all: position_ids is {found}; wanted {tuple(ids.shape)}, or loss_rows")
    return positions.expand_as(ids)


@uncompiled
def call_of(
    config: DistillConfig, inputs: Mapping[str, Any], targets: Tensor, given: Given, model: nn.Module
) -> HeadCall:
    """The loss of a forward with `inputs` and `targets` `[B, S]`.

    With `soft_on: all` the soft loss is on `given.loss_rows`, or on the rows that `soft_rows` finds.

    Raises:
        ValueError: token weights of another shape, one number of items without the other; or as `soft_rows`.
    """
    checks.token_weights(given.token_weights, targets[..., None])
    splits, mask = config.soft_everywhere, None
    check_items(given.num_items, given.soft_items, splits=splits, mask="distill.soft_on all", suffix="_in_batch")
    if splits and given.loss_rows is None:
        mask = soft_rows(inputs, targets, config.ignore_index, model)
    call = HeadCall(None, targets, given.loss_rows, given.token_weights, mask)
    call.splits = splits
    if given.teacher is not None and config.soft_weight:
        if getattr(model.config, "is_encoder_decoder", False):
            raise SoftRowsError("teacher_input_ids are for decoders, and this is an encoder-decoder: leave them out")
        if splits:
            raise SoftRowsError(
                "distill.soft_on is all, but of a prompt the teacher reads other tokens (teacher_input_ids): set it to "
                "trained"
            )
        call.teacher_rows = given.teacher.checked_rows(targets, config.ignore_index)
    return call


@uncompiled
def known_items(
    call: HeadCall, hidden: Tensor, ignore_index: int, given: Given, group: ProcessGroup | None
) -> tuple[Number, int] | None:
    """What the loss sum of a call that splits is divided by, and by how many ranks multiplied; None for any other.

    The call is told what a labelled row weighs. Without numbers of items the rows of all ranks are counted by one
    collective, and the wrapper's averaging over ranks is undone; without gradients, those of this rank.

    Args:
        call: of the forward.
        hidden: `[B, S, D]`, of the student.
        ignore_index: the label of rows without one.
        given: the numbers of items, if they are known.
        group: the ranks.
    """
    if not call.splits:
        return None
    num_items, soft_items = given.num_items, given.soft_items
    ranks = 1
    if num_items is None:
        counts = _counts(call, ignore_index)
        if torch.is_grad_enabled() and (ranks := num_ranks(group)) > 1:
            all_reduce(counts, group, "numbers of rows (pass num_items_in_batch and soft_items_in_batch instead)")
        soft_items, num_items = counts.clamp_min(1).to(wide_dtype(hidden.dtype)).unbind()
    pair = [divisor(given, 0) for given in (soft_items, num_items)]
    items = Items(*(x.to(hidden.device, wide_dtype(hidden.dtype)) if isinstance(x, Tensor) else x for x in pair))
    call.hard_factor = items.factor
    return items.soft, ranks


def _counts(call: HeadCall, ignore_index: int) -> Tensor:
    """Rows of the soft loss and labelled rows of this rank, int64 [2]."""
    assert call.targets is not None
    labelled = call.targets != ignore_index
    if call.soft_mask is not None:
        return torch.stack([call.soft_mask.sum(), labelled.sum()])
    assert call.rows is not None
    hard = labelled[call.rows].sum()
    return torch.stack([torch.full_like(hard, call.rows.numel()), hard])
