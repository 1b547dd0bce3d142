"""Bytes that one rank receives, by what causes them.

All of it counts what a ring moves: f = (W - 1) / W of the whole for a gather or a reduce-scatter, twice that
for an all-reduce. Under HSDP, W is the size of a group, and what the copies tell each other has a line of its own.
What stays within a node and what crosses between nodes is not told apart.
"""

from __future__ import annotations

from typing import NamedTuple

from kd_plugin.divergences.objective import make_objective
from kd_plugin.estimate.setup import Line, Setup
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.exchange import cost
from kd_plugin.exchange.cost import Head, stats_bytes, teacher_logits_bytes
from kd_plugin.row_kernels import sharded_dispatch

_FLOAT = 4


class Volume(NamedTuple):
    """Bytes received per rank and micro-batch for the two heads."""

    num_bytes: float
    how: str


def exchanges(setup: Setup) -> dict[str, Volume]:
    """Every exchange that this objective allows -> its bytes per micro-batch, as this wrapper does it."""
    found = {"weight": _weight(setup)}
    if setup.world_size > 1 and not setup.by_rank:
        if setup.teacher is not None:
            found["logits"] = _logits(setup)
        found["stats"] = _stats(setup)
    return found


def recommended(setup: Setup) -> str:
    """The exchange with the fewest bytes; `weight`, the simplest, where they are equal."""
    found = exchanges(setup)
    return min(found, key=lambda name: found[name].num_bytes)


def settled(setup: Setup) -> str:
    """The exchange that the run will take: as configured, or by the plugin's own rule for `auto`."""
    settled_by, teacher = cost.by_settings(setup.distill, ranks=setup.world_size), setup.teacher
    if settled_by is not None:
        return settled_by
    assert teacher is not None  # else no soft loss, which the settings settle
    item = setup.student_item  # of both heads: the plugin's rule knows the hidden states' only
    own, other = _student_head(setup), _teacher_head(setup, teacher)._replace(item_bytes=item)
    own = own if setup.student_head_is_cut else own._replace(ranks=1)
    other = other._replace(ranks=1) if teacher.tied else other
    return cost.cheapest(setup.distill, own, other, setup.tokens, ranks=setup.exchange_ranks)[0]


def _student_head(setup: Setup) -> Head:
    student, reduced = setup.student, setup.student_item if setup.is_zero else _FLOAT
    ranks = setup.group_ranks if setup.gathers_student else 1
    return Head(student.vocab_size, student.width, ranks, setup.student_item, reduced if student.head_trainable else 0)


def _teacher_head(setup: Setup, teacher: ModelSizes) -> Head:
    return Head(teacher.vocab_size, teacher.width, setup.teacher_ranks, setup.teacher_item)


def _student_gathered(setup: Setup) -> tuple[float, str]:
    """Gathering the student's head and reducing its gradient, where that happens per micro-batch."""
    head = _student_head(setup)
    if not setup.gathers_student:
        return 0.0, f"student's head is whole under {setup.mode}"
    size, how = head.num_bytes, f"f V D x {head.item_bytes}"
    if head.reduced_bytes:
        how = f"f V D x ({head.item_bytes} gathered + {head.reduced_bytes} reduced)"
    if setup.mode == "fsdp1" and not setup.student.tied:  # gathers a unit for backward whether or not that reads it
        return size + head._replace(reduced_bytes=0).num_bytes, f"{how}, and gathered again in backward"
    return size, how


def _teacher_gathered(setup: Setup) -> tuple[float, str]:
    teacher = setup.teacher
    if teacher is None or not setup.teacher_sharded:
        return 0.0, "teacher's head is whole" if teacher else "no teacher"
    return _teacher_head(setup, teacher).num_bytes, f"f V' E x {setup.teacher_item}"


def _weight(setup: Setup) -> Volume:
    if setup.world_size == 1:
        return Volume(0.0, "one rank: nothing crosses a wire")
    (student, how), (teacher, teacher_how) = _student_gathered(setup), _teacher_gathered(setup)
    return Volume(student + teacher, f"{how} + {teacher_how}")


def _tied_teacher(setup: Setup) -> tuple[float, str]:
    """A tied teacher's head is gathered with its embedding, whatever the exchange."""
    assert setup.teacher is not None
    if not (setup.teacher.tied and setup.teacher_sharded):
        return 0.0, ""
    size, how = _teacher_gathered(setup)
    return size, f" + {how} (tied to its embedding)"


def _logits(setup: Setup) -> Volume:
    assert setup.teacher is not None
    student, how = _student_gathered(setup)
    tied, tied_how = _tied_teacher(setup)
    heads = _student_head(setup), _teacher_head(setup, setup.teacher)
    own = teacher_logits_bytes(*heads, setup.rows, ranks=setup.exchange_ranks)
    columns = "V'" if setup.unequal else "V"
    return Volume(student + own + tied, f"{how} + (W - 1) n E x {setup.teacher_item} + f n {columns} x 4{tied_how}")


def _stats(setup: Setup) -> Volume:
    teacher, ranks = setup.teacher, setup.exchange_ranks
    m, k = numbers = sharded_dispatch.exchanged_numbers(make_objective(setup.distill), setup.unequal)
    other = None if teacher is None else _teacher_head(setup, teacher)
    size = stats_bytes(_student_head(setup), other, setup.rows, ranks=ranks, numbers=numbers)
    how = f"(W - 1) n ({setup.student_item} D + {setup.teacher_item} E + 4 D + 4 x {m} W + 8 x {k} + 16)"
    if not setup.student_head_is_cut:
        extra, extra_how = _student_gathered(setup)
        size, how = size + extra, f"{how} + {extra_how}"
    if teacher is not None:
        tied, tied_how = _tied_teacher(setup)
        size, how = size + tied, how + tied_how
    return Volume(size, how)


def parameters(setup: Setup) -> tuple[Line, ...]:
    """Bytes received per optimizer step for everything but the heads' exchange."""
    if setup.world_size == 1:
        return ()
    lines = [*_student(setup), *_copies(setup)]
    teacher, share = setup.teacher, (setup.teacher_ranks - 1) / setup.teacher_ranks
    if teacher is not None and setup.teacher_sharded:
        rest = teacher.numel - teacher.head_numel
        size = setup.accumulation * share * rest * setup.teacher_item
        lines.append(Line("teacher gathered", size, f"{_times(setup)}f x {rest:,} x {setup.teacher_item} B"))
    return tuple(lines)


def _copies(setup: Setup) -> list[Line]:
    """HSDP's all-reduce: once per step; in every micro-batch under FSDP1, and of rows that `stats` leaves cut."""
    if setup.copies == 1:
        return []
    ranks, copies, student = setup.group_ranks, setup.copies, setup.student
    own = student.trainable / ranks
    again = 0.0
    how = f"2 f' x {student.trainable:,} / {ranks} x 4 B, f' = {copies - 1} / {copies}, "
    if setup.mode == "fsdp1":
        again = (setup.accumulation - 1) * own
        how += "in every micro-batch"
    else:
        if setup.exchange == "stats" and setup.student_head_is_cut and student.head_trainable:
            again = (setup.accumulation - 1) * student.head_numel / ranks
        how += "once per step" + (f"; the head's part {setup.accumulation} times" if again else "")
    return [Line("gradients between copies", 2 * (copies - 1) / copies * (own + again) * _FLOAT, how)]


def _times(setup: Setup) -> str:
    return f"{setup.accumulation} micro-batches x " if setup.accumulation > 1 else ""


def _student(setup: Setup) -> list[Line]:
    student, item, times = setup.student, setup.student_item, setup.accumulation
    share = (setup.group_ranks - 1) / setup.group_ranks
    trained = student.trainable
    if setup.mode == "ddp":
        return [Line("student gradients", 2 * share * trained * _FLOAT, f"2 f x {trained:,} x 4 B, once per step")]
    if setup.mode == "zero0":
        return [Line("student gradients", 2 * share * trained * item, f"2 f x {trained:,} x {item} B, once per step")]
    if setup.mode in ("zero1", "zero2"):
        every = times if setup.mode == "zero2" else 1
        return [
            Line("student gradients", every * share * trained * item, f"f x {trained:,} x {item} B, {every} per step"),
            Line("student parameters", share * trained * item, f"f x {trained:,} x {item} B after each step"),
        ]
    rest = student.numel - student.head_numel
    rest_trained = trained - student.head_numel * student.head_trainable
    # FSDP leaves its root whole. Neither embedding nor head need their weights in backward, which FSDP1 does not know.
    again = sum(unit.numel for unit in student.units if unit.name == "layer")
    if setup.mode == "fsdp1":
        learning = [unit for unit in student.units if any(weight.trainable for weight in unit.weights)]
        again += sum(unit.numel for unit in learning if unit.name == "embedding")
        rest_trained = sum(unit.numel for unit in learning) - student.head_numel * student.head_trainable  # flat, whole
    twice = rest if setup.is_zero else again
    gathered = times * share * (rest + twice) * item
    reduced_item = item if setup.is_zero else _FLOAT
    reduced = times * share * rest_trained * reduced_item
    how = f"{_times(setup)}f x ({rest:,} forward + {twice:,} backward) x {item} B"
    return [
        Line("student gathered", gathered, how),
        Line("student gradients", reduced, f"{_times(setup)}f x {rest_trained:,} x {reduced_item} B"),
    ]
