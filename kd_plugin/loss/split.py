# pyright: strict
# pyright: reportUnnecessaryIsInstance=false
"""Rows that count in one of the two losses and not in the other, as `distill.soft_on: all` has them.

Notable decisions:
- each loss is divided by the rows of its own. What is left to divide by at the end are the items of the soft loss; so
  a row of the hard loss weighs as much more as there are fewer of them (`Split.factor`). The reciprocal on the soft
  rows would do the same, but it is below 1, and takes half-precision gradients of hidden states towards 0;
- a row without a label has weight 0 in the hard loss, and a finite logit in place of its label's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.row_kernels.statistics import LOSSES
from kd_plugin.settings.distill import DistillConfig

Number = int | float | Tensor


class Split(NamedTuple):
    """Which of the rows count in which loss."""

    soft: Tensor | None
    """bool `[N]`; None: every row that counts at all."""
    hard: Tensor
    """bool `[N]`, the rows with a label."""
    factor: float | Tensor = 1.0
    """What a row of the hard loss weighs where one of the soft loss weighs 1; 0-d."""

    def counts(self, rows: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
        """How many of `rows` (flat indices; None: of all) count in the soft and in the hard loss: int64, 0-d."""
        chosen = slice(None) if rows is None else rows
        hard = self.hard[chosen].sum()
        return (torch.full_like(hard, num_rows) if self.soft is None else self.soft[chosen].sum()), hard


class RowWeights(NamedTuple):
    """What the rows of a chunk weigh, `[n, 1]` each; None: 1."""

    soft: Tensor | None
    """Of the soft loss, and of both where `hard` is None."""
    hard: Tensor | None
    """Of the hard loss's gradient, where that is another."""
    hard_value: Tensor | None
    """Of the hard loss's value."""
    measured: Tensor | None
    """Of the metrics."""

    @property
    def of_labels(self) -> Tensor | None:
        """Those of the labels' part of the gradient."""
        return self.soft if self.hard is None else self.hard

    def finite(self, label_logits: Tensor) -> Tensor:
        """`[n, 1]`, with 0 where a row has no label: another token's logit in its place may be -inf."""
        if self.hard is None:
            return label_logits
        return torch.where(self.hard == 0, torch.zeros_like(label_logits), label_logits)

    def apply_to(self, statistics: Tensor) -> None:
        """Weight the statistics `[n, len(STATISTICS)]`, in place."""
        soft, hard, others = statistics[:, :1], statistics[:, 1:2], statistics[:, len(LOSSES) :]
        for values, weights in ((soft, self.soft), (hard, self.hard_value), (others, self.measured)):
            if weights is not None:
                values *= weights


def row_weights(
    token_weights: Tensor | None, split: Split | None, rows: slice | Tensor, dtype: torch.dtype
) -> RowWeights:
    """The weights of `rows`, of those of all rows `[N]` and of how they are split between the losses."""
    both = None if token_weights is None else token_weights[rows, None].to(dtype)
    if split is None:
        return RowWeights(both, None, both, None)
    hard, measured = split.hard[rows, None].to(dtype), None if split.soft is None else split.soft[rows, None].to(dtype)
    hard = hard if both is None else hard * both
    soft = both if measured is None else measured if both is None else measured * both
    return RowWeights(soft, hard * split.factor, hard, measured)


def check_soft_mask(soft_mask: Tensor | None, targets: Tensor | None, rows: torch.Size, config: DistillConfig) -> None:
    """Refuse a mask that is none, or that `distill.soft_on: all` cannot do without.

    Raises:
        ValueError: saying what is wanted.
    """
    if soft_mask is None:
        if config.soft_everywhere and targets is not None:
            raise ValueError(
                "soft_on is all, but which rows without a label are padding is not known here: pass soft_mask, a bool "
                f"tensor {tuple(rows)} that is True for each row whose next token is a real one, or set soft_on=trained"
            )
        return
    if not isinstance(soft_mask, Tensor) or soft_mask.dtype != torch.bool or soft_mask.shape != rows:
        tensor = isinstance(soft_mask, Tensor)
        found = f"{soft_mask.dtype} {tuple(soft_mask.shape)}" if tensor else type(soft_mask).__name__
        raise ValueError(f"soft_mask is {found}; wanted torch.bool {tuple(rows)}, the rows of the soft loss")


def check_items(
    num_items: object, soft_items: object, *, splits: bool, mask: str = "soft_mask", suffix: str = ""
) -> None:
    """Refuse a number of items for one loss where the two are divided by numbers of their own.

    Raises:
        ValueError: naming the one that is missing, or that nothing is divided by.
    """
    if soft_items is not None and not splits:
        raise ValueError(
            f"soft_items{suffix} is given without {mask}, where num_items{suffix} divides both losses: leave it out"
        )
    if splits and (num_items is None) != (soft_items is None):
        given, missing = ("num_items", "soft_items") if soft_items is None else ("soft_items", "num_items")
        raise ValueError(
            f"{given}{suffix} is given without {missing}{suffix}: with {mask} the soft loss is divided by the rows "
            f"that it counts on (soft_items{suffix}), the hard loss by those with a label (num_items{suffix}): "
            "pass both, or neither"
        )
