"""Bytes that one rank receives per micro-batch for the heads of sharded models, by `distill.exchange`.

With f = (W - 1) / W, n rows per rank, e bytes per weight and hidden state, r bytes per reduced gradient (none of a
frozen head), widths D (student) and E (teacher), vocabulary V (of unequal ones, each head's own; of the teacher's
logits, the ids of both), m numbers per row that every rank gathers (two per softmax, of which a student with more token
ids than the teacher has one more, and the label's logit), k sums per row that are added over ranks (0 for KLs):

    weight   f V (e (D + E) + r D)                           gather both heads, reduce-scatter a gradient
    logits   f V (e + r) D + (W - 1) n e E + 4 f n V         the student's head; teacher hidden states, logits
    stats    (W - 1) n (e (D + E) + 4 D + 4 m W + 8 k + 16)  hidden states, their gradient, numbers per row

A teacher that runs ahead over a micro-batches of a step has its head gathered once: E / a for E in the first line.
`weight` does not depend on the rows, `stats` not on the vocabulary; `logits` wins in between only where the
teacher is much wider than its share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from kd_plugin.divergences.objective import make_objective
from kd_plugin.row_kernels.sharded_numbers import exchanged_numbers
from kd_plugin.settings.distill import DistillConfig, ExchangeMode

_FP32 = 4
REDUCED_BYTES = _FP32
"""Bytes of one number of a gradient as FSDP reduces it (`engines.fsdp_units`)."""
_KL_NUMBERS = (6, 0)  # of a KL at temperature 1 with cross-entropy and metrics


class Head(NamedTuple):
    """One model's head, as its wrapper gathers it."""

    vocab_size: int
    width: int
    ranks: int
    """How many ranks cut it; 1 if it is whole on each rank, or tied to an embedding that is gathered anyway."""
    item_bytes: int
    """Bytes of one weight, and of one number of a hidden state."""
    reduced_bytes: int = 0
    """Bytes of one number of its gradient as it is reduced; 0 for a frozen head."""
    served: float = 1
    """Micro-batches that one gather serves in `weight`: of a teacher that runs ahead, or of a frozen student."""

    @property
    def num_bytes(self) -> float:
        """Bytes that a rank receives per micro-batch to gather it, and to reduce-scatter its gradient once."""
        numel = self.vocab_size * self.width
        return (self.ranks - 1) / self.ranks * numel * (self.item_bytes / self.served + self.reduced_bytes)


def weight_bytes(student: Head, teacher: Head) -> float:
    """Bytes that a rank receives per micro-batch with `exchange: weight`."""
    return student.num_bytes + teacher.num_bytes


def logits_bytes(student: Head, teacher: Head, rows: float, *, ranks: int) -> float:
    """Bytes that a rank receives per micro-batch with `exchange: logits` among `ranks`, with `rows` each."""
    own = student._replace(served=1).num_bytes  # a head that is kept for several micro-batches is `weight`'s
    return own + teacher_logits_bytes(student, teacher, rows, ranks=ranks)


def teacher_logits_bytes(student: Head, teacher: Head, rows: float, *, ranks: int) -> float:
    """The part of `logits_bytes` that does not concern the student's head."""
    columns = min(student.vocab_size, teacher.vocab_size)
    return (ranks - 1) * rows * (teacher.item_bytes * teacher.width + _FP32 * columns / ranks)


def stats_bytes(
    student: Head,
    teacher: Head | None,
    rows: float,
    *,
    ranks: int,
    numbers: tuple[int, int] = _KL_NUMBERS,
    splits: bool = False,
) -> float:
    """Bytes that a rank receives per micro-batch with `exchange: stats` among `ranks`, with `rows` each.

    `numbers` are m and k, as `sharded_numbers.exchanged_numbers` counts them; by default those of a KL at temperature
    1 with cross-entropy and metrics. `splits`: rows may count in the soft loss alone.
    """
    gathered, added = numbers
    per_row = 4 * gathered * ranks + 8 * added + 16  # 16: label, weight, and whether the row is padding
    per_row += 16 * splits  # the weights of the hard loss, and what aligns them
    hidden = student.item_bytes * student.width
    if teacher is not None:
        hidden += teacher.item_bytes * teacher.width
    return (ranks - 1) * rows * (hidden + _FP32 * student.width + per_row)


def volumes(
    student: Head,
    teacher: Head,
    rows: float,
    *,
    ranks: int,
    numbers: tuple[int, int] = _KL_NUMBERS,
    splits: bool = False,
) -> dict[ExchangeMode, float]:
    """The bytes of each mode, which `auto` compares; arguments as of `stats_bytes`."""
    return {
        "weight": weight_bytes(student, teacher),
        "logits": logits_bytes(student, teacher, rows, ranks=ranks),
        "stats": stats_bytes(student, teacher, rows, ranks=ranks, numbers=numbers, splits=splits),
    }


def by_settings(config: DistillConfig, *, ranks: int) -> ExchangeMode | None:
    """The exchange that `config` settles for so many ranks in all; None where `auto` has to compare volumes.

    Between less than two ranks nothing crosses a wire, and an objective that sorts whole rows has no other choice.
    """
    if ranks == 1 or make_objective(config).sorts:
        return "weight"
    if not config.soft_weight:
        return "stats" if config.exchange == "stats" else "weight"
    return None if config.exchange == "auto" else config.exchange


def cheapest(
    config: DistillConfig,
    student: Head,
    teacher: Head,
    rows: float,
    *,
    ranks: int,
    without: Collection[ExchangeMode] = (),
) -> tuple[ExchangeMode, dict[ExchangeMode, float]]:
    """The rule behind `auto`: the mode with the fewest bytes (`weight`, then `logits`, if equal), and those of each.

    Args:
        config: the objective.
        student: its head, `ranks` 1 in it where its own traffic is the same in every mode.
        teacher: likewise.
        rows: of each rank.
        ranks: that exchange.
        without: modes that are not possible.
    """
    numbers = exchanged_numbers(make_objective(config), teacher.vocab_size < student.vocab_size)
    every = volumes(student, teacher, rows, ranks=ranks, numbers=numbers, splits=config.soft_everywhere)
    possible: dict[ExchangeMode, float] = {mode: size for mode, size in every.items() if mode not in without}
    return min(possible, key=lambda mode: possible[mode]), possible
