# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnnecessaryIsInstance=false
"""What a loss returns, and how its sums become means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.distributed import torch_internals
from kd_plugin.loss import checks, chunk_loop
from kd_plugin.loss.split import Number, check_items
from kd_plugin.row_kernels.statistics import STATISTICS


class DistillOutput(NamedTuple):
    """`loss == soft_weight * soft_loss + hard_weight * hard_loss`; only `loss` is differentiable."""

    loss: Tensor
    """Scalar, fp32 (fp64 for fp64 inputs)."""
    soft_loss: Tensor
    """Scalar: temperature ** temperature_power * divergence, per item."""
    hard_loss: Tensor
    """Scalar: cross-entropy, per item."""
    num_valid: Tensor
    """Scalar int64: rows of this call that count, in either loss."""
    metrics: dict[str, Tensor]
    """Scalars per row of the soft loss by name; `divergences.measures.MEASURED` has the names."""


class LossSums(NamedTuple):
    """Un-normalised result of one call."""

    loss_sum: Tensor  # differentiable scalar
    statistics: Tensor  # [len(STATISTICS)] sums over the valid rows
    num_valid: Tensor  # scalar int64
    measured: tuple[str, ...]
    """Which metrics mean something for this objective."""
    workspace_bytes: int = 0
    dense_bytes: int = 0
    group_rows: int | None = None
    """Valid rows of all ranks with which this one agreed on its chunks; None if with none."""
    num_rows: int = 0
    """`num_valid`, known without waiting for the device."""
    num_soft: Tensor | None = None
    """Rows of the soft loss, scalar int64; None: all that count."""
    num_hard: Tensor | None = None
    """Rows of the hard loss, likewise."""


class Items(NamedTuple):
    """What the sums of each loss are divided by; 1 or more, or as the caller has it."""

    soft: float | Tensor
    hard: float | Tensor

    @classmethod
    def of_both(cls, items: float | Tensor) -> Items:
        """The same for both losses."""
        return cls(items, items)

    @property
    def factor(self) -> float | Tensor:
        """What a row of the hard loss weighs in a sum that is divided by `soft`."""
        return self.soft / self.hard


def packed(loss_sum: Tensor, statistics: Tensor, problem: chunk_loop.Problem) -> LossSums:
    """The sums with what else is known of the call."""
    num_valid = torch.full((), problem.num_rows, dtype=torch.int64, device=statistics.device)
    measured, held, dense = problem.objective.measured, problem.workspace_bytes, problem.dense_bytes
    rows, split = problem.num_rows, problem.split
    counts = (None, None) if split is None else split.counts(problem.rows, rows)
    return LossSums(loss_sum, statistics, num_valid, measured, held, dense, problem.group_rows, rows, *counts)


def normalised(sums: LossSums, items: Items | None) -> DistillOutput:
    """Divide the sums by `items` (None: the valid rows of this call)."""
    num_valid = sums.num_valid
    num_soft = num_valid if sums.num_soft is None else sums.num_soft
    if items is None:
        items = Items.of_both(divisor(None, num_valid))
    soft, hard = sums.statistics[0] / items.soft, sums.statistics[1] / items.hard
    per_row = sums.statistics / num_soft.clamp_min(1)
    by_name: dict[str, Tensor] = dict(zip(STATISTICS, per_row.unbind(), strict=True))
    metrics = {name: by_name[name] for name in sums.measured}
    return DistillOutput(sums.loss_sum / items.soft, soft, hard, num_valid, metrics)


def items_of(
    soft_mask: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    num_items: Number | None,
    soft_items: Number | None,
) -> Items | None:
    """What the two losses are divided by; None: both by the valid rows, which are not known yet.

    Args:
        soft_mask: bool `[...]`, the rows of the soft loss; None: both losses have the same.
        targets: `[...]`.
        ignore_index: the label of rows without one.
        dtype: of the hidden states.
        num_items: of the hard loss, or of both; None: its rows.
        soft_items: of the soft loss; None: its rows.

    Raises:
        ValueError: one of them is given where both are wanted, or is negative or no number.
    """
    check_items(num_items, soft_items, splits=soft_mask is not None)
    if soft_mask is None:
        return None if num_items is None else Items.of_both(divisor(num_items, 1))
    labelled = soft_mask.new_zeros(()) if targets is None else targets != ignore_index
    found = (divisor(soft_items, soft_mask.sum()), divisor(num_items, labelled.sum()))
    wide = chunk_loop.wide_dtype(dtype)  # a quotient of integers would be fp32
    soft, hard = (items.to(wide) if isinstance(items, Tensor) else items for items in found)
    return Items(soft, hard)


def divisor(num_items: int | float | Tensor | None, num_valid: int | Tensor) -> float | Tensor:
    """What the sums over rows are divided by: `num_items`, or the valid rows; 1 where that is 0.

    Raises:
        ValueError: negative, or a tensor of more than one number.
    """
    items = num_valid if num_items is None else num_items
    if not isinstance(items, Tensor | int | float):
        raise ValueError(f"num_items is a {type(items).__name__}; wanted the number of tokens to divide by, 0 or more")
    if isinstance(items, Tensor):
        if items.numel() != 1:
            raise ValueError(f"num_items has shape {tuple(items.shape)}; wanted one number, e.g. labels.ne(-100).sum()")
        items = items.reshape(())
        if checks.free_to_read(items) and items < 0:
            raise ValueError(f"num_items is {items}; wanted the number of tokens to divide by, 0 or more")
        return torch.where(items == 0, torch.ones_like(items), items)
    if not items >= 0:
        raise ValueError(f"num_items is {items}; wanted the number of tokens to divide by, 0 or more")
    return items or 1


def scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """`gradient * scale` in fp32, then cast; in blocks, so that a half-precision gradient is never held wide.

    `dtype` is None where there is no gradient either.

    In place when autograd is about to free the saved tensors anyway, never when it keeps them.
    """
    if gradient is None:
        return None
    assert dtype is not None
    if gradient.dtype == scale.dtype == dtype:
        return gradient * scale if torch_internals.graph_is_kept() else gradient.mul_(scale)
    result = torch.empty_like(gradient, dtype=dtype)
    for block, out in zip(gradient.split(1024), result.split(1024), strict=True):
        out.copy_(block.to(scale.dtype) * scale)
    return result
