"""What the benchmarks of whole steps and of packing conclude from their numbers, and what they feed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.benchmark_scripts import loaded

MODULES = ("common", "cases", "contestants", "race", "report", "ranks", "received")
MODULES += ("ahead_worker", "teacher_ahead", "packing", "estimate_time")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmarks' modules by name."""
    with loaded(MODULES) as modules:
        yield modules


def test_targets_of_a_teacher_ahead_compare_all_at_once_with_none(bench: Any) -> None:
    def line(together: int, **numbers: Any) -> dict[str, Any]:
        return {"together": together, "hidden": 100, **numbers}

    first = line(1, gathers=80, bytes=900.0, gather_s=[1.0, 2.0, 9.0], seconds=[4.0, 6.0, 5.0], peaks=[1000, 1300])
    between = line(2, gathers=40, bytes=500.0, gather_s=[7.0] * 3, seconds=[7.0] * 3, peaks=[7000])
    last = line(8, gathers=10, bytes=200.0, gather_s=[0.1, 0.6, 0.9], seconds=[4.0, 5.4, 5.5], peaks=[1105, 1120])
    found = bench.teacher_ahead.targets([first, between, last])
    assert [target.measured for target in found] == pytest.approx([0.125, 0.1, 1.0, 1.05])
    assert [target.verdict for target in found] == ["met"] * 4
    last |= {"gathers": 11, "gather_s": [0.3, 0.6, 0.9], "seconds": [5.0, 6.6, 5.5], "peaks": [1111]}
    found = bench.teacher_ahead.targets([first, between, last])
    assert [target.verdict for target in found] == ["not met"] * 4
    rows = bench.teacher_ahead.table([first | {"teacher_s": [1.0]}, last | {"teacher_s": [0.5]}])
    assert [row["step / as the student"] for row in rows] == [1.0, 1.1]


def test_targets_of_packing_compare_isolated_with_joined(bench: Any) -> None:
    rates = {"isolated": 0.8, "joined": 1.0, "padded": 0.5}
    table = [
        {"text": "topics: 3 documents", "packing": name, "padding %": 100 * (1 - rate), "tokens/s / joined": rate}
        | {"per CPU second / joined": rate}
        for name, rate in rates.items()
    ]
    padding, speed = bench.packing.targets(table)
    assert (padding.measured, padding.verdict) == (pytest.approx(20), "not met")
    assert (speed.measured, speed.by_cpu, speed.verdict) == (1.25, 1.25, "not met")


def test_padded_micro_batches_hold_every_token_once(bench: Any) -> None:
    documents = [bench.packing.Document(np.arange(3, 3 + n), np.ones(n, dtype=bool)) for n in (5, 12, 9)]
    batches = bench.packing.padded(documents, 10, seed=0)
    for _ in range(8):
        inputs, tokens = next(batches)
        assert tokens == int(inputs["attention_mask"].sum()) == int((inputs["labels"] != -100).sum())
        assert inputs["input_ids"].shape[1] == inputs["attention_mask"].sum(1).max() <= 10


def test_a_step_that_is_faster_than_estimated_is_as_far_off_as_a_slower_one(bench: Any) -> None:
    rows = [{"step / estimate": clock, "by CPU time": cpu} for clock, cpu in ((0.5, 1.0), (1.1, 1.2), (1.2, 0.4))]
    median, worst = bench.estimate_time.targets(rows)
    assert (median.measured, median.by_cpu, median.verdict) == (1.2, 1.2, "met")
    assert (worst.measured, worst.by_cpu, worst.verdict) == (2.0, 2.5, "met")
