"""A micro-batch of one rank, out of sequences of equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Item", "collate"]

Item = dict[str, np.ndarray]
"""One sequence, by name."""

_OF_TEACHER = ("teacher_input_ids", "teacher_position_ids", "teacher_rows")


class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: int64 [B, S].
        labels: int64 [B, S], unshifted.
        shift_labels: int64 [B, S], for each position the label of the next token.
        loss_rows: int64 [N], the rows b * S + s of the flattened hidden states whose next token counts in a loss.
        position_ids: int64 [B, S], from 0 in each document; None where documents are joined.
        of_teacher: what the teacher reads, where that is another text: teacher_input_ids and teacher_position_ids,
            int64 [B, S], and teacher_rows, int64 [B, S]: for each row the flattened row of the teacher that predicts
            the same token, -1 where there is none; else empty.
        num_valid: N as a number of the host, so that nobody has to ask the device for it.
        num_trained: how many of them have a label; fewer where the soft loss counts on all tokens.
    """

    def __init__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        shift_labels: Tensor,
        loss_rows: Tensor,
        position_ids: Tensor | None = None,
        *,
        num_trained: int | None = None,
        of_teacher: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.input_ids, self.labels, self.shift_labels, self.loss_rows = input_ids, labels, shift_labels, loss_rows
        self.position_ids, self.of_teacher = position_ids, dict(of_teacher or {})
        self.num_valid = loss_rows.numel()
        self.num_trained = self.num_valid if num_trained is None else num_trained

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the models read, targets or not."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = (self.input_ids, self.labels, self.shift_labels, self.loss_rows, self.position_ids)
        moved = (tensor.to(device, non_blocking=non_blocking) for tensor in tensors if tensor is not None)
        of_teacher = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.of_teacher.items()}
        return Batch(*moved, num_trained=self.num_trained, of_teacher=of_teacher)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of an attached student's forward.

        Labels by row: next tokens are what is trained on here, whether or not the student's class shifts its labels.
        """
        inputs = {"input_ids": self.input_ids, "shift_labels": self.shift_labels, "loss_rows": self.loss_rows}
        inputs |= self.of_teacher
        return inputs if self.position_ids is None else {**inputs, "position_ids": self.position_ids}


def collate(items: Sequence[Item], ignore_index: int = -100) -> Batch:
    """Stack items of equal length into a batch, and find the rows that enter the loss."""
    input_ids = np.stack([item["input_ids"] for item in items])
    labels = np.stack([item["labels"] for item in items])
    shifted = np.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]  # the last row of a sequence has no next token
    counted = shifted != ignore_index
    num_trained = int(counted.sum())
    if "scored" in items[0]:
        counted[:, :-1] |= np.stack([item["scored"] for item in items])[:, 1:]
    arrays = [input_ids, labels, shifted, np.flatnonzero(counted)]
    if "position_ids" in items[0]:
        arrays.append(np.stack([item["position_ids"] for item in items]))
    tensors = (torch.from_numpy(array) for array in arrays)
    return Batch(*tensors, num_trained=num_trained, of_teacher=_of_teacher(items))


def _of_teacher(items: Sequence[Item]) -> dict[str, Tensor]:
    """What the teacher reads of the items, and its rows flattened as the student's are; empty where it is the same."""
    if "teacher_rows" not in items[0]:
        return {}
    stacked = {name: np.stack([item[name] for item in items]) for name in _OF_TEACHER}
    rows = stacked["teacher_rows"]
    before = np.arange(len(items))[:, None] * rows.shape[1]
    stacked["teacher_rows"] = np.where(rows < 0, rows, rows + before)
    return {name: torch.from_numpy(array) for name, array in stacked.items()}
