"""Bytes that one rank receives, by what causes them.

All of it counts what a ring moves: f = (W - 1) / W of the whole for a gather or a reduce-scatter, twice that
for an all-reduce. Under HSDP, W is the size of a group, and what the copies tell each other has a line of its own.
What stays within a node and what crosses between nodes is not told apart.
"""

from __future__ import annotations

from typing import NamedTuple

from kd_plugin.divergences.objective import make_objective
from kd_plugin.estimate.setup import Line, Setup, keeps_student_head, runs_ahead, teacher_forwards
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.exchange import cost
from kd_plugin.exchange.cost import Head, stats_bytes, teacher_logits_bytes
from kd_plugin.row_kernels.sharded_numbers import exchanged_numbers
from kd_plugin.settings.distill import ExchangeMode

_FLOAT = 4


class Volume(NamedTuple):
    """Bytes received per rank and micro-batch for the two heads."""

    num_bytes: float
    how: str


def exchanges(setup: Setup) -> dict[ExchangeMode, Volume]:
    """Bytes per micro-batch of every exchange that the objective allows, by name, under the wrapper of `setup`."""
    volumes: dict[ExchangeMode, Volume] = {"weight": _weight(setup)}
    if setup.world_size > 1 and not setup.sorts:
        if setup.teacher is not None:
            volumes["logits"] = _logits(setup)
        volumes["stats"] = _stats(setup)
    return volumes


def recommended(setup: Setup) -> ExchangeMode:
    """The name of the exchange with the fewest bytes; `weight`, the simplest, where they are equal."""
    volumes = exchanges(setup)
    return min(volumes, key=lambda name: volumes[name].num_bytes)


def settled(setup: Setup) -> ExchangeMode:
    """The name of the exchange that the run will take: as configured, or by the plugin's own rule for `auto`."""
    settled_by, teacher = cost.by_settings(setup.distill, ranks=setup.world_size), setup.teacher
    if settled_by is not None:
        return settled_by
    assert teacher is not None  # else no soft loss, which the settings settle
    item = setup.student_item  # for both heads: the plugin's rule knows the dtype of hidden states only
    own, other = _student_head(setup), _teacher_head(setup, teacher)._replace(item_bytes=item)
    own = own if setup.student_head_is_cut else own._replace(ranks=1)
    own = own._replace(served=setup.accumulation) if keeps_student_head(setup) else own
    other = other._replace(ranks=1) if teacher.tied else other._replace(served=_served(setup))
    return cost.cheapest(setup.distill, own, other, setup.tokens, ranks=setup.exchange_ranks)[0]


def _student_head(setup: Setup) -> Head:
    student, reduced = setup.student, setup.student_item if setup.is_zero else cost.REDUCED_BYTES
    ranks = setup.group_ranks if setup.gathers_student else 1
    return Head(student.vocab_size, student.width, ranks, setup.student_item, reduced if student.head_trainable else 0)


def _teacher_head(setup: Setup, teacher: ModelSizes) -> Head:
    return Head(teacher.vocab_size, teacher.width, setup.teacher_ranks, setup.teacher_item)


def _served(setup: Setup) -> float:
    """Micro-batches that one gather of the teacher's head serves in exchange `weight`.

    A head of its own is copied in the first forward of a step that runs ahead; one in a unit with the embedding comes
    with each forward, and so does what ZeRO-3 prefetches in the order of the first forward of all.
    """
    if setup.teacher is None or not runs_ahead(setup):
        return 1
    return setup.accumulation / (teacher_forwards(setup) if setup.teacher.tied or setup.is_zero else 1)


def _student_gathered(setup: Setup) -> tuple[float, str]:
    """Bytes per micro-batch to gather the student's head and to reduce its gradient, and how they come about."""
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
    served = _served(setup)
    size, how = _teacher_head(setup, teacher)._replace(served=served).num_bytes, f"f V' E x {setup.teacher_item}"
    return (size, f"{how} / {served:g}, for as many micro-batches") if served > 1 else (size, how)


def _weight(setup: Setup) -> Volume:
    if setup.world_size == 1:
        return Volume(0.0, "one rank: nothing crosses a wire")
    (student, how), (teacher, teacher_how) = _student_gathered(setup), _teacher_gathered(setup)
    if keeps_student_head(setup):
        student, how = student / setup.accumulation, f"{how} / {setup.accumulation}"
    return Volume(student + teacher, f"{how} + {teacher_how}")


def _tied_teacher(setup: Setup) -> tuple[float, str]:
    """Bytes of a tied teacher's head, which is gathered with its embedding whatever the exchange is."""
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
    m, k = numbers = exchanged_numbers(make_objective(setup.distill), setup.unequal)
    other = None if teacher is None else _teacher_head(setup, teacher)
    splits = setup.distill.soft_everywhere
    size = stats_bytes(_student_head(setup), other, setup.rows, ranks=ranks, numbers=numbers, splits=splits)
    of_row = 32 if splits else 16
    how = f"(W - 1) n ({setup.student_item} D + {setup.teacher_item} E + 4 D + 4 x {m} W + 8 x {k} + {of_row})"
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
        times = teacher_forwards(setup)
        size = times * share * rest * setup.teacher_item
        how = f"{times} forwards x " if times > 1 else ""
        lines.append(Line("teacher gathered", size, f"{how}f x {rest:,} x {setup.teacher_item} B"))
    return tuple(lines)


def _copies(setup: Setup) -> list[Line]:
    """HSDP's all-reduce: once per step, but in every micro-batch under FSDP1 and for a head that `stats` leaves cut."""
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
    if setup.gathers_student:
        return _gathered_student(setup)
    item, times, trained = setup.student_item, setup.accumulation, setup.student.trainable
    share = (setup.group_ranks - 1) / setup.group_ranks
    if setup.mode == "ddp":
        return [Line("student gradients", 2 * share * trained * _FLOAT, f"2 f x {trained:,} x 4 B, once per step")]
    if setup.mode == "zero0":
        return [Line("student gradients", 2 * share * trained * item, f"2 f x {trained:,} x {item} B, once per step")]
    every = times if setup.mode == "zero2" else 1  # else zero1
    return [
        Line("student gradients", every * share * trained * item, f"f x {trained:,} x {item} B, {every} per step"),
        Line("student parameters", share * trained * item, f"f x {trained:,} x {item} B after each step"),
    ]


def _gathered_student(setup: Setup) -> list[Line]:
    """Traffic of a student that is cut over the ranks, without its head: it is gathered, and its gradients reduced."""
    student, item, times = setup.student, setup.student_item, setup.accumulation
    share = (setup.group_ranks - 1) / setup.group_ranks
    rest = student.numel - student.head_numel
    again = rest if setup.is_zero else _gathered_again(setup)
    trained, trained_item = _reduced_numel(setup), item if setup.is_zero else _FLOAT
    how = f"{_times(setup)}f x ({rest:,} forward + {again:,} backward) x {item} B"
    return [
        Line("student gathered", times * share * (rest + again) * item, how),
        Line(
            "student gradients",
            times * share * trained * trained_item,
            f"{_times(setup)}f x {trained:,} x {trained_item} B",
        ),
    ]


def _gathered_again(setup: Setup) -> int:
    """Elements that FSDP gathers once more for backward; it leaves its root whole.

    Neither embedding nor head need their weights there, which FSDP1 does not know.
    """
    again = sum(unit.numel for unit in setup.student.units if unit.name == "layer")
    if setup.mode == "fsdp1":
        again += sum(unit.numel for unit in setup.student.learning if unit.name == "embedding")
    return again


def _reduced_numel(setup: Setup) -> int:
    """Elements of the gradients that are reduced, without the head's; FSDP1 reduces whole flat units."""
    student = setup.student
    trained = sum(unit.numel for unit in student.learning) if setup.mode == "fsdp1" else student.trainable
    return trained - student.head_numel * student.head_trainable
