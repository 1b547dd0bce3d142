"""`benchmarks/gpu.sh` on a CPU: its oracle is right, its budget holds, and what is missing is skipped by name."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmark_scripts import BENCHMARKS, loaded

ROOT = Path(__file__).parents[1]
MODULES = (
    "cases",
    "contestants",
    "sampled_errors",
    "gpu_part",
    "gpu_points",
    "race",
    "gpu_loss",
    "time_split",
    "gpu_profile",
    "common",
    "gpu_report",
    "gpu",
)


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmarks' modules by name; they are scripts that import each other as such."""
    with loaded(MODULES) as modules:
        yield modules


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("soft", "hard"), [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_sampled_gradients_are_those_of_autograd(
    bench: Any, monkeypatch: pytest.MonkeyPatch, temperature: float, soft: float, hard: float
) -> None:
    monkeypatch.setattr(bench.sampled_errors, "_BLOCK_BYTES", 8 * 64 * 7)  # blocks of 7 rows
    case = bench.cases.Case(
        rows=40,
        vocab=64,
        width=8,
        teacher_width=12,
        ignored=0.25,
        temperature=temperature,
        soft_weight=soft,
        hard_weight=hard,
    )
    tensors = bench.cases.make_tensors(case).to(torch.float64)
    oracle = bench.sampled_errors.sampled_oracle(case, tensors, num_rows=9, num_token_ids=16)
    loss, grad_hidden, grad_weight = bench.contestants.oracle_of(case, tensors)
    assert len(oracle.rows) == 9 and 8 <= len(oracle.token_ids) <= 16
    torch.testing.assert_close(oracle.loss, loss)
    torch.testing.assert_close(oracle.grad_hidden, grad_hidden[oracle.rows])
    torch.testing.assert_close(oracle.grad_weight, grad_weight[oracle.token_ids])


def test_sampled_errors_see_a_wrong_gradient_and_no_other_divergence(bench: Any) -> None:
    case = bench.cases.Case(rows=40, vocab=64, width=8)
    tensors = bench.cases.make_tensors(case)
    oracle = bench.sampled_errors.sampled_oracle(case, tensors)
    loss = bench.contestants.naive(case, tensors)()
    assert max(bench.sampled_errors.sampled_errors(oracle, loss, tensors)) < 1e-5
    tensors.weight.grad[oracle.token_ids] *= 1.01
    assert bench.sampled_errors.sampled_errors(oracle, loss, tensors).weight == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(ValueError, match="the case has jsd"):
        bench.sampled_errors.sampled_oracle(replace(case, divergence="jsd"), tensors)


def test_a_close_teacher_of_another_width_has_the_students_logits(bench: Any) -> None:
    case = bench.cases.Case(rows=40, vocab=64, width=8, teacher_width=12, teacher_noise=0.01)
    tensors = bench.cases.make_tensors(case)
    student, teacher = (tensors.hidden @ tensors.weight.T).detach(), tensors.teacher_hidden @ tensors.teacher_weight.T
    assert 0.001 < bench.contestants.relative(teacher, student) < 0.03


@pytest.mark.parametrize("contestant", ["kd_plugin", "naive"])
def test_under_autocast_the_student_is_fp32_and_its_gradients_are(bench: Any, contestant: str) -> None:
    case = bench.cases.Case(rows=40, vocab=64, width=8, dtype="bfloat16", autocast=True, row_kernel="eager")
    tensors = bench.cases.make_tensors(case)
    assert [t.dtype for t in tensors[:4]] == [torch.float32] * 2 + [torch.bfloat16] * 2
    loss = bench.contestants.CONTESTANTS[contestant](case, tensors)()
    assert tensors.weight.grad.dtype == torch.float32
    errors = bench.sampled_errors.sampled_errors(bench.sampled_errors.sampled_oracle(case, tensors), loss, tensors)
    assert max(errors) < 0.02


def test_every_point_of_a_full_run_has_a_label_of_its_own_and_a_floor(bench: Any) -> None:
    options = bench.gpu_part.Part("cuda", False, 1.0, Path(), 1)
    groups = list(bench.gpu_points.groups(options))
    points = [point for group in groups for point in group]
    assert len({point.label for point in points}) == len(points)
    assert all(len({point.contestant for point in group}) == 1 for group in groups), "one process a contestant"
    timed = {(point.case.vocab, point.case.rows) for point in points if point.table == "loss"}
    assert timed == {(128256, rows) for rows in (1024, 2048, 4096, 8192)} | {(151936, 8192)}
    for vocab, rows in timed:
        names = {point.name for point in points if (point.case.vocab, point.case.rows) == (vocab, rows)}
        assert {"four products", "kd_plugin", "compiled naive", "Liger", "TRL"} <= names
    assert not any(point.case.hard_weight for point in points if point.contestant == "TRL")


def test_shares_of_the_time_add_up_to_all_of_it(bench: Any) -> None:
    left = 100.0
    for index in range(len(bench.gpu.PARTS)):
        left -= bench.gpu.shares(bench.gpu.PARTS[index:], left)
    assert left == pytest.approx(0.0)


def test_a_part_that_lacks_a_package_fails_or_is_late_is_said_so(bench: Any) -> None:
    assert bench.gpu.outcome(0, "") == "done"
    assert "its time was over" in bench.gpu.outcome(None, "")
    printed = "Traceback\n  line\nModuleNotFoundError: No module named 'x'\n"
    assert bench.gpu.outcome(1, printed) == "skipped: No module named 'x'"
    assert bench.gpu.outcome(1, "a\n\nb\nc\nValueError: d\n") == "failed: b / c / ValueError: d"


def test_a_part_over_its_time_is_ended_with_the_processes_that_it_started(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "late.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(bench.gpu, "HERE", tmp_path)
    run = bench.gpu.Run(bench.gpu.options(["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]))
    begin = time.monotonic()
    run.run(bench.gpu.PartOfRun("late", "late.py", 1), 5)
    assert time.monotonic() - begin < 20
    child = int(run.log.read_text().split()[0])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break  # ended; whoever adopted it has not asked for its exit code yet
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{child}").exists()
    assert "its time was over" in (tmp_path / "out" / "gpu.md").read_text()


def test_kernels_are_counted_by_kind_and_gaps_are_where_none_runs(bench: Any) -> None:
    kernel = bench.gpu_profile.Kernel
    kernels = [
        kernel("nvjet_tst_128x256", 0, 3000),
        kernel("triton_red_fused_exp", 4000, 5000),
        kernel("Memcpy DtoD", 4500, 6000),  # beside the one before
        kernel("something", 9000, 9500),
    ]
    found = bench.gpu_profile.split(kernels)
    assert found["products"] == 3 and found["row pass"] == 1 and found["copies and fills"] == 1.5
    assert found["other kernels"] == 0.5 and found["gaps"] == 4 and found["whole call"] == 9.5


def loss_row(contestant: str, ms: float, error: float | None = None, **values: Any) -> dict[str, Any]:
    columns = {"kind": "loss", "key": contestant, "shape": "8/8/64", "tokens": 32, "contestant": contestant}
    columns |= {"computes": "KL", "ms": ms, "gib": None, "promised_gib": None, "calls": 3}
    return columns | {"loss_error": error, "hidden_error": error, "weight_error": error} | values


def test_targets_compare_the_right_lines_and_the_last_of_equal_keys_counts(bench: Any) -> None:
    lines = [
        loss_row("four products", 10.0),
        loss_row("kd_plugin", 99.0, 0.002, gib=2.0, promised_gib=2.0),
        loss_row("Liger", 20.0, 0.001),
        loss_row("kd_plugin, metrics off", 1.0, 0.002),
        loss_row("kd_plugin", 12.0, 0.002, gib=2.0, promised_gib=2.0),
    ]
    results = bench.gpu_report.Results(lines)
    found = {target.what: (target.measured, target.verdict) for target in bench.gpu_report.loss_targets(results)}
    where = ", 8/8/64, 32 tokens"
    assert found[f"time: kd_plugin / four products{where}"] == (1.2, "met")
    assert found[f"time: kd_plugin / Liger{where}"] == (0.6, "met")
    assert found[f"gradient error: kd_plugin / Liger{where}"] == (2.0, "not met")
    assert found[f"memory: kd_plugin's peak / what it promises{where}"] == (1.0, "met")
    assert len(found) == 4
    assert {target.verdict for target in bench.gpu_report.other_targets(results)} == {"not measured"}


def test_a_line_that_was_cut_off_is_left_out(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu.jsonl").write_text(json.dumps(loss_row("kd_plugin", 1.0)) + '\n{"kind": "lo')
    bench.gpu_report.write(tmp_path)
    assert "| kd_plugin | 1 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_writes_its_tables_and_skips_what_is_missing_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name in ("liger_kernel", "trl"):
        (tmp_path / "missing" / name).mkdir(parents=True)
        reason = f"raise ModuleNotFoundError(\"No module named '{name}'\")\n"
        (tmp_path / "missing" / name / "__init__.py").write_text(reason)
    out = tmp_path / "out"
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--quick", "--minutes", "8", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "missing"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    page = (out / "gpu.md").read_text()
    for name in ("tests", "loss", "profile", "step", "ranks"):
        assert f"| {name} | done |" in page, page + (out / "gpu.log").read_text()[-3000:]
    assert "A dry run: its numbers mean nothing." in page
    for name in ("liger_kernel", "trl"):
        assert f"No module named '{name}'" in page.split("## Skipped")[1]
    for title in ("**32/48/512, 64 tokens**", "| distillation step |", "| stats |", "| row pass"):
        assert title in page
    rows = list(csv.DictReader((out / "gpu_loss.csv").read_text().splitlines()))
    ours = [row for row in rows if row["contestant"] == "kd_plugin"]
    assert [(row["shape"], row["tokens"]) for row in ours] == [
        ("32/48/512", "32"),
        ("32/48/512", "64"),
        ("32/32/640", "64"),
    ]
    assert all(float(row["hidden_error"]) < 1e-5 and float(row["weight_error"]) < 1e-5 for row in ours)
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    parity = [line for line in lines if line["kind"] == "ranks"]
    assert len(parity) == 3 and all(line["gradient_error"] < 1e-5 for line in parity)
    assert len(list(out.iterdir())) <= 8
