"""`teacher.micro_batch_size: auto`: how many micro-batches memory allows at once, and that nothing else changes."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.training import checkpoint, memory
from kd_plugin.training.run import TrainResult
from tests.tiny_runs import curve, make_folder, run_config

ONE = 2**20  # bytes of a teacher's forward of one micro-batch, in tests that say so
STEPS = 4
HIDDEN = 8 * 32 * 32 * 4  # bytes of the hidden states of a step: tokens, width, fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def trained(folder: Path, name: str, sequences: int | str | None, **train: Any) -> TrainResult:
    """Steps of eight micro-batches of one sequence."""
    values = {"micro_batch_size": 1, "max_steps": STEPS, "export": False, "eval_sequences": 2, **train}
    return kd.train(run_config(folder, name, train=values, teacher={"micro_batch_size": sequences}))


def numbers(result: TrainResult) -> list[list[float]]:
    return [curve(result, name) for name in ("loss", "soft_loss", "grad_norm", "kl_t1")]


@pytest.fixture(scope="module")
def as_student(folder: Path) -> TrainResult:
    return trained(folder, "as_student", None)


@contextmanager
def short_of_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    """What is free is `free` bytes, and a forward takes `ONE` byte number; what the run does with it is real."""

    @contextmanager
    def measured(_parameters: int) -> Iterator[memory.Taken]:
        taken = memory.Taken()
        yield taken
        taken.num_bytes = ONE

    with monkeypatch.context() as patched:
        patched.setattr(memory, "free_bytes", lambda: free)
        patched.setattr(memory, "peak_above_now", lambda: 0)
        patched.setattr(memory, "measured", measured)
        yield


@pytest.mark.parametrize(
    ("free", "together"),
    [
        (100 * ONE, 8),
        (3 * ONE + 5, 3),
        (HIDDEN - 1, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((7 * ONE, 4), (ONE, 1))),
    ],
)
def test_as_many_go_together_as_fit_in_even_forwards_and_the_run_stays_bit_equal(
    folder: Path,
    as_student: TrainResult,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    together: int,
) -> None:
    read: list[int] = []
    real = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda ids, *args, **kw: (read.append(len(ids)), real(ids, *args, **kw))[1]
    )
    with short_of_memory(monkeypatch, free), caplog.at_level(logging.INFO, "kd_plugin"):
        result = trained(folder, f"free_{free}", "auto")
    assert numbers(result) == numbers(as_student)
    assert (max(read[2:]) == together) or together == 1
    said = [line for line in caplog.messages if line.startswith("teacher.micro_batch_size: auto")]
    assert len(said) == 1
    expected = f"auto -> {together}, {together} of 8" if free >= HIDDEN else "auto -> as the student"
    assert expected in said[0]


def test_the_memory_of_this_machine_lets_a_tiny_teacher_read_all_at_once(
    folder: Path, as_student: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kd_plugin"):
        assert numbers(trained(folder, "auto", "auto")) == numbers(as_student)
    (said,) = [line for line in caplog.messages if line.startswith("teacher.micro_batch_size: auto")]
    assert re.search(r"auto -> [2-8], [2-8] of 8 micro-batches at once", said), said
    assert f"{HIDDEN / 2**20:.1f} MiB are kept" in said


def test_a_run_continues_with_the_number_that_it_had(
    folder: Path, as_student: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with short_of_memory(monkeypatch, 3 * ONE):
        whole = trained(folder, "saved", "auto", save_every=1, keep_checkpoints=9)
    kept = {step: folder / "saved" / "checkpoints" / f"step_{step:08d}" for step in range(1, STEPS + 1)}
    assert [json.loads((path / "run.json").read_text())["teacher_together"] for path in kept.values()] == [
        None,  # not settled yet
        *[3] * (STEPS - 1),
    ]
    config = run_config(folder, "saved", train={"micro_batch_size": 1, "max_steps": STEPS})
    assert checkpoint.together_in(kept[2], config, 1) == 3
    assert checkpoint.together_in(kept[2], config, 2) is None, "other ranks"
    other = run_config(folder, "saved", train={"micro_batch_size": 2, "max_steps": STEPS})
    assert checkpoint.together_in(kept[2], other, 1) is None, "other micro-batches"
    for step in (3, 4):
        shutil.rmtree(kept[step])
    calls = []
    monkeypatch.setattr(memory, "free_bytes", lambda: calls.append(1) or 0)
    resumed = trained(folder, "saved", "auto", save_every=1, keep_checkpoints=9, resume=True)
    assert not calls, "nothing is measured anew"
    assert json.loads((kept[4] / "run.json").read_text())["teacher_together"] == 3
    for all_steps, last_two, never_ahead in zip(numbers(whole), numbers(resumed), numbers(as_student), strict=True):
        assert all_steps[2:] == last_two == never_ahead[2:]


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMORY = {"proc__meminfo": "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   600 kB\n"}
GROUP = "sys__fs__cgroup__memory"


@pytest.mark.parametrize(
    ("files", "kilobytes"),
    [
        ({}, 0),
        (MEMORY, 500),
        ({"proc__meminfo": "MemTotal:  1000 kB\nMemAvailable:   60 kB\n"}, 0),
        (MEMORY | {f"{GROUP}.max": "max\n", f"{GROUP}.current": "7"}, 500),
        (
            MEMORY
            | {f"{GROUP}.max": f"{400 * 1024}\n", f"{GROUP}.current": f"{300 * 1024}\n"}
            | {f"{GROUP}.stat": f"anon 5\ninactive_file {100 * 1024}\n"},
            160,
        ),
        (MEMORY | {f"{GROUP}__memory.limit_in_bytes": f"{2**60}", f"{GROUP}__memory.usage_in_bytes": "9"}, 500),
        (
            MEMORY
            | {f"{GROUP}__memory.limit_in_bytes": f"{200 * 1024}", f"{GROUP}__memory.usage_in_bytes": f"{80 * 1024}"},
            100,
        ),
    ],
)
def test_free_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kilobytes: int
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    root = write(tmp_path, **files)
    assert memory.free_bytes(root) == kilobytes * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(root) == kilobytes * 1024 // 4


def test_what_work_takes_is_never_measured_as_less() -> None:
    held = torch.ones(2**24)
    with memory.measured(held.nbytes) as taken:
        again = torch.ones(2**25)
    assert taken.num_bytes >= again.nbytes
    size = again.nbytes
    del again
    assert memory.peak_above_now() >= size // 2  # the allocator gives such large blocks back
