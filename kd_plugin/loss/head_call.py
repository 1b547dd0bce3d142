"""What is handed through the head's forward."""

from __future__ import annotations

from torch import Tensor

from kd_plugin.distributed.vocab_slice import VocabSlice
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.loss.output import LossSums
from kd_plugin.loss.teacher import TeacherSource


class HeadCall:
    """One loss computation, as handed through the head's forward.

    A plain object on purpose: FSDP2's mixed precision casts every float tensor it finds in tuples, dicts and
    dataclasses among a module's arguments, the 1/N inside them included.
    """

    def __init__(
        self,
        teacher: TeacherSource | None,
        targets: Tensor,  # [N] int64
        rows: Tensor | None = None,  # [n] int64
        token_weights: Tensor | None = None,  # [N]
    ) -> None:
        self.teacher, self.targets, self.rows, self.token_weights = teacher, targets, rows, token_weights
        self.vocab_slice: VocabSlice | None = None
        """Set when the vocabulary is cut over the ranks; the teacher then holds its columns only."""
        self.low_rank: LowRank | None = None
        """What an adapter around the head adds to its logits."""
        self.sums: LossSums | None = None
        """Filled in by the head; `sums.loss_sum` is what the head returns."""
