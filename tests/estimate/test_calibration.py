"""Speeds of this processor, measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from kd_plugin.estimate.account import estimate
from kd_plugin.estimate.calibration import measured_speeds
from kd_plugin.estimate.speeds import Speeds
from kd_plugin.estimate.tables import notes_of, tables_of
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def measured(folder: Path, world_size: int = 1, **sections: object) -> Speeds:
    config = run_config(folder, train={"tokens_per_step": None}, **sections)
    time = estimate(config, world_size=world_size, device="cpu").time
    assert time is not None
    return time.speeds


def seconds_of_product(rows: int, width: int, columns: int) -> float:
    left, right = torch.randn(rows, width), torch.randn(width, columns)
    times = []
    for _ in range(20):
        start = time.thread_time()
        left @ right
        times.append(time.thread_time() - start)
    return min(times)


def test_a_large_product_takes_as_long_as_measured(folder: Path, tmp_path: Path) -> None:
    """By processor time on both sides, and within what other programs do to caches."""
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(folder / "teacher", hidden_size=512, intermediate_size=1024).save_pretrained(tmp_path)
    student = {"from_teacher": None, "model": str(tmp_path)}
    speeds = measured(folder, student=student, data={"seq_len": 128})
    expected = 2 * 256 * 512 * 1024 / seconds_of_product(256, 512, 1024)
    assert 0.4 < speeds.student.product / expected < 2.5
    assert "with 1 thread" in speeds.how and speeds.wire == 0.0
    assert not speeds.is_asynchronous


def test_ranks_share_the_machine_and_its_loopback(folder: Path) -> None:
    speeds = measured(folder, world_size=512)
    assert "all 512 ranks taken to be on this machine" in speeds.how
    assert "threads for each core" in speeds.how
    assert 0 < speeds.wire < 1e9
    assert torch.get_num_threads() == 1
    alone = measured(folder)
    assert alone.memory / speeds.memory > 512 / (torch.multiprocessing.cpu_count() + 1) / 8


def test_sorting_counts_where_the_objective_sorts(folder: Path) -> None:
    plain, sorting = (measured(folder, distill={"divergence": name}) for name in ("forward_kl", "uld"))
    assert sorting.logit_seconds > plain.logit_seconds


def test_more_temperatures_and_eager_kernels_take_longer(folder: Path) -> None:
    config = run_config(folder, distill={"temperature": 1.0, "row_kernel": "compile"})
    base = estimate(config, device="cpu").setup

    def seconds(**distill: object) -> float:
        changed = config.model_copy(update={"distill": config.distill.model_copy(update=distill)})
        from dataclasses import replace

        return measured_speeds(replace(base, config=changed)).logit_seconds

    assert seconds(row_kernel="eager") > 2 * seconds()


def test_the_output_says_that_it_measured(folder: Path) -> None:
    estimated = estimate(run_config(folder), device="cpu")
    (table,) = (table for table in tables_of(estimated) if table.title == "time of one optimizer step")
    assert [row[0] for row in table.rows][:3] == ["teacher forward", "student forward", "student backward"]
    assert table.rows[-1][0] == "step" and "tokens/s" in table.rows[-1][-1]
    (note,) = (note for note in notes_of(estimated) if note.startswith("step time: limited by"))
    assert note.endswith("measured now on this processor with 1 thread")
