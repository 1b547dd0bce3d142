"""Inputs that the teacher reads in place of the student's, and the rows of both that predict the same token.

    student(input_ids, labels=..., teacher_input_ids=..., teacher_position_ids=..., teacher_rows=...)

Notable decisions:
- only hidden states have to correspond: those of the teacher are put in the order of the student's rows before the loss
  sees them, so every exchange, kernel and chunk is as always;
- that rows correspond is looked at, not assumed: the token after the teacher's row has to be the label of the
  student's. On a GPU the device looks, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_plugin.distributed.torch_internals import assert_on_device
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss import checks

__all__ = ["TeacherInputsError", "TeacherReads", "taken_from"]

_OWN = ("input_ids", "attention_mask", "position_ids")
_ROWS = "teacher_rows"
_OF_TOKENS = {*_OWN, "token_type_ids"}


class TeacherInputsError(ValueError):
    """Inputs of the teacher's own that do not belong to the student's."""


class TeacherReads(NamedTuple):
    """What the teacher is called with, and which of its rows are meant."""

    inputs: dict[str, Any]
    """Keyword arguments, `input_ids` `[B', S']` among them."""
    rows: Tensor
    """int64 `[B, S]`, for each row of the student the flat index of the teacher's; -1 where there is none."""

    @uncompiled
    def checked_rows(self, targets: Tensor, ignore_index: int) -> Tensor:
        """The teacher's row of each row of the student, `[N]`; 0 where a row does not count.

        Args:
            targets: `[B, S]`, the label of each row.
            ignore_index: the label of rows that do not count.

        Raises:
            TeacherInputsError: rows of another shape, or that count and correspond to no row with the same next token.
        """
        ids = self.inputs["input_ids"]
        if self.rows.shape != targets.shape or self.rows.dtype != torch.int64:
            raise TeacherInputsError(
                f"teacher_rows is {self.rows.dtype} {tuple(self.rows.shape)}; wanted torch.int64 "
                f"{tuple(targets.shape)}, the flat index of the teacher's row for each row of the student, or -1"
            )
        rows, labels, flat = self.rows.flatten(), targets.flatten(), ids.flatten()
        counted = labels != ignore_index
        inside = (rows >= 0) & (rows < flat.numel() - 1)
        predicted = flat[torch.where(inside, rows + 1, 0)]
        fits = inside & (predicted == labels)
        wrong = counted & ~fits
        message = (
            "teacher_rows: a row with a label has to name the row of teacher_input_ids whose next token is that label"
        )
        if not checks.free_to_read(rows):
            assert_on_device(~wrong.any(), message)
        elif wrong.any():
            first = int(wrong.nonzero()[0])
            found = f"{int(rows[first])}, before token {int(predicted[first])}" if inside[first] else int(rows[first])
            raise TeacherInputsError(f"{message}; row {first} with label {int(labels[first])} names {found}")
        return torch.where(counted, rows, 0)


@uncompiled
def taken_from(inputs: dict[str, Any]) -> TeacherReads | None:
    """Take what is meant for the teacher alone out of the keyword arguments of a student's forward; None for nothing.

    Raises:
        TeacherInputsError: tokens without rows, rows without tokens, or inputs about the student's tokens that the
            teacher would be given with its own.
    """
    given = {name: inputs.pop(f"teacher_{name}", None) for name in _OWN}
    own, rows = {name: value for name, value in given.items() if value is not None}, inputs.pop(_ROWS, None)
    if rows is None and not own:
        return None
    if not isinstance(rows, Tensor) or not isinstance(own.get("input_ids"), Tensor):
        raise TeacherInputsError(
            "the teacher's own inputs are teacher_input_ids [B', S'] and teacher_rows [B, S] together, and "
            f"teacher_attention_mask or teacher_position_ids; found {', '.join(_found(own, rows))}"
        )
    others = {name: value for name, value in inputs.items() if name not in _OF_TOKENS and value is not None}
    if strange := sorted(name for name, value in others.items() if isinstance(value, Tensor)):
        raise TeacherInputsError(
            f"the student got {', '.join(strange)}, which would be about its own tokens and not about the teacher's: "
            "leave it out, or leave out the teacher's own inputs"
        )
    return TeacherReads({**others, **own}, rows)


def _found(own: Mapping[str, Any], rows: object) -> list[str]:
    return [*(f"teacher_{name}" for name in own), *([_ROWS] if rows is not None else [])]
