"""One computation of the loss, as it is handed through the head's forward."""

from __future__ import annotations

from torch import Tensor

from kd_plugin.distributed.vocab_slice import VocabSlice
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.loss.output import LossSums
from kd_plugin.loss.teacher import TeacherSource


class HeadCall:
    """What one computation of the loss takes beside the student's hidden states and head.

    A plain object on purpose: FSDP2's mixed precision casts every float tensor it finds in tuples, dicts and
    dataclasses among a module's arguments, the 1/N inside them included.

    Args:
        teacher: source of the teacher's logits; None if there is no soft loss.
        targets: `[...]` int64, the label of each row; kept as `[N]`. None: there is no hard loss, and every row counts.
        rows: `[n]` int64, flat indices of the valid rows; None: found by the labels.
        token_weights: `[...]`, multiplies each row's loss; kept as `[N]`.
        soft_mask: bool `[...]`, the rows that the soft loss counts on, where they are not those with a label; kept as
            `[N]`. None: those that have one, or all `rows` where the call `splits`.
    """

    def __init__(
        self,
        teacher: TeacherSource | None,
        targets: Tensor | None,
        rows: Tensor | None = None,
        token_weights: Tensor | None = None,
        soft_mask: Tensor | None = None,
    ) -> None:
        self.teacher, self.rows = teacher, rows
        self.targets = None if targets is None else targets.reshape(-1)
        self.token_weights = None if token_weights is None else token_weights.reshape(-1)
        self.soft_mask = None if soft_mask is None else soft_mask.reshape(-1)
        self.splits = soft_mask is not None
        """Whether a row may count in the soft loss and have no label."""
        self.hard_factor: float | Tensor = 1.0
        """Of a call that splits: `split.Split.factor`."""
        self.teacher_rows: Tensor | None = None
        """`[N]` int64, the row of the teacher's hidden states for each row; None: the same."""
        self.chunk_size: int | None = None
        """Rows of one chunk, where the ranks have agreed on them; else each decides."""
        self.vocab_slice: VocabSlice | None = None
        """Set when the vocabulary is cut over the ranks; the teacher then holds its columns only."""
        self.low_rank: LowRank | None = None
        """What an adapter around the head adds to its logits."""
        self.keeps_head = False
        """Whether the head is to leave a copy of itself, for the next micro-batches of the step."""
        self.kept_head: tuple[Tensor, Tensor | None] | None = None
        """Weight `[V, D]` and bias `[V]` that an earlier micro-batch of the step has left, or this one leaves."""
        self.sums: LossSums | None = None
        """Filled in by the head; `sums.loss_sum` is what the head returns."""

    def aligned(self, teacher_hidden: Tensor) -> Tensor:
        """The teacher's hidden states `[..., E]` in the order of the student's rows, `[N, E]`."""
        flat = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
        return flat if self.teacher_rows is None else flat[self.teacher_rows]
