"""What `distill.exchange: auto` takes, and what it counts before."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kd_plugin.exchange import cost
from tests.ranks import automatic_probes, sharded_heads
from tests.ranks.launch import Launch, Launched

LAUNCHES = {
    "two": Launch(
        automatic_probes, ranks=2, spec=["automatic_zero3", "outside_zero3"], together="deepspeed", needs_deepspeed=True
    ),
    "four": Launch(automatic_probes, ranks=4, spec=["automatic"], together="four"),
}


def volumes_of(ranks: int, student_ranks: int, teacher_ranks: int, *, rows: int, reduced: int = 4) -> dict[str, float]:
    student = cost.Head(sharded_heads.VOCAB_SIZE, sharded_heads.STUDENT_WIDTH, student_ranks, 4, reduced)
    teacher = cost.Head(sharded_heads.VOCAB_SIZE, sharded_heads.TEACHER_WIDTH, teacher_ranks, 4)
    return cost.volumes(student, teacher, rows, ranks=ranks, numbers=sharded_heads.NUMBERS)


MANY, FEW = automatic_probes.AUTO_ROWS
SHARDED_BYTES = volumes_of(4, 4, 4, rows=MANY)
# launch, layout: the mode, the bytes of each, words of the line that says it
AUTOMATIC: dict[tuple[str, str], tuple[str, dict[str, float], str]] = {
    ("four", "sharded"): ("stats", SHARDED_BYTES, "W 4, "),
    ("four", "replicated"): ("weight", volumes_of(4, 4, 1, rows=MANY), "the teacher's head is there anyway"),
    ("four", "tied"): ("weight", volumes_of(4, 4, 1, rows=MANY), "the teacher's head is there anyway"),
    ("four", "frozen"): ("weight", volumes_of(4, 4, 4, rows=MANY, reduced=0), "the student's head is frozen"),
    ("four", "groups"): ("stats", volumes_of(2, 2, 2, rows=MANY), "W 2, "),
    ("four", "student tied"): ("stats", volumes_of(4, 1, 4, rows=FEW), "the student's head is whole in each"),
    ("four", "ddp"): ("stats", volumes_of(4, 1, 4, rows=FEW), "the student's head is whole in each"),
    ("four", "fsdp1"): ("weight", volumes_of(4, 1, 4, rows=MANY), "the student's head is whole in each"),
    ("two", "zero3"): ("stats", volumes_of(2, 1, 2, rows=FEW), "the student's head is whole in each"),
}


@pytest.mark.parametrize(("launch_name", "layout"), AUTOMATIC)
def test_auto_counts_what_weight_really_gathers(
    launched: Callable[[str], Launched], launch_name: str, layout: str
) -> None:
    mode, sizes, words = AUTOMATIC[launch_name, layout]
    everyone = launched(launch_name).file("automatic_zero3.pt" if layout == "zero3" else "automatic.pt")
    assert [found[layout][0] for found in everyone] == [mode] * LAUNCHES[launch_name].ranks
    (message,) = everyone[0][layout][1:]
    assert all(len(found[layout]) == 1 for found in everyone[1:]), "only rank 0 speaks"
    assert words in message
    assert all(f"{exchange_mode} {size / 1e6:.4g} MB" in message for exchange_mode, size in sizes.items())
    assert min(sizes, key=lambda name: sizes[name]) == mode


def test_a_teacher_that_is_whole_saves_its_gather() -> None:
    saved = SHARDED_BYTES["weight"] - volumes_of(4, 4, 1, rows=MANY)["weight"]
    assert saved == pytest.approx(3 / 4 * sharded_heads.VOCAB_SIZE * sharded_heads.TEACHER_WIDTH * 4)


def test_a_partitioned_head_outside_of_its_forward_is_refused_by_name(launched: Callable[[str], Launched]) -> None:
    for message in launched("two").file("outside_zero3.pt"):
        assert "ZeRO-3 or FSDP1 has partitioned it away" in message
        assert "kd_plugin.attach(student, teacher, config) before deepspeed.initialize" in message
