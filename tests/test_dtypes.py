"""Precisions that a device lacks: refused where they were asked for, left out where `auto` chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kd_plugin as kd
from kd_plugin import checks, precision, training
from kd_plugin.engine import Placement
from kd_plugin.estimate import estimate
from kd_plugin.parallel import zero
from tests.tiny import make_folder, run_config

CPU = torch.device("cpu")


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU of 2017, as torch would describe it."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    checks.has_bfloat16.cache_clear()
    yield torch.device("cuda", 0)
    checks.has_bfloat16.cache_clear()


def test_bfloat16_is_refused_where_the_gpu_only_emulates_it(
    volta: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"teacher.dtype is bfloat16, which Tesla V100 \(cuda:0\) does not have: use float32, or float16"
    with pytest.raises(ValueError, match=message):
        checks.half_precision("teacher.dtype", torch.bfloat16, volta)
    for dtype, device in ((torch.float16, volta), (torch.float32, volta), (torch.bfloat16, torch.device("cpu"))):
        checks.half_precision("teacher.dtype", dtype, device)
    checks.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    checks.half_precision("teacher.dtype", torch.bfloat16, volta)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_is_refused_before_a_model_is_loaded(
    volta: torch.device, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(make_folder(tmp_path), **{role: {"dtype": "bfloat16"}})
    monkeypatch.setattr(training, "_load", lambda *arguments: pytest.fail("a model was loaded"))
    place = Placement(volta, rank=0, world_size=1, owns_group=False)
    with pytest.raises(ValueError, match=f"{role}.dtype is bfloat16, which Tesla V100"):
        training._train(config, place, "single")


# -- dtype: auto --------------------------------------------------------------------------------------------


def slower_by(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose bfloat16 products take `factor` times as long as those in float32."""
    monkeypatch.setattr(precision, "slowdown", lambda dtype, device_type: factor)


@pytest.mark.parametrize(("factor", "chosen"), [(0.3, "bfloat16"), (12.0, "float32")])
def test_auto_is_the_faster_precision_of_the_processor(
    factor: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower_by(factor, monkeypatch)
    found, why = precision.automatic_dtype(CPU)
    assert found == chosen and f"{factor:g} x as long" in why


def test_the_processor_here_is_measured() -> None:
    found, why = precision.automatic_dtype(CPU)
    assert found in ("bfloat16", "float32") and "this processor" in why


def test_auto_is_never_what_a_gpu_lacks(volta: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.automatic_dtype(volta) == ("float32", "Tesla V100 does not have bfloat16")
    checks.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert precision.automatic_dtype(volta)[0] == "bfloat16"


def test_only_auto_is_replaced(tmp_path: Path) -> None:
    config = run_config(tmp_path, teacher={"dtype": "auto"}, student={"dtype": "float16"})
    settled = precision.with_dtypes(config, "bfloat16")
    assert (settled.teacher.dtype, settled.student.dtype) == ("bfloat16", "float16")
    assert precision.with_dtypes(settled, "float32") == settled


def test_a_run_says_what_auto_became_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slower_by(12.0, monkeypatch)
    both = {role: {"dtype": "auto"} for role in ("teacher", "student")}
    config = run_config(make_folder(tmp_path), train={"max_steps": 1}, **both)
    with caplog.at_level(logging.INFO):
        result = kd.train(config)
    assert "dtype: auto -> float32 (bfloat16 products take 12 x as long on this processor)" in caplog.text
    saved = kd.load_config(result.output_dir / "config.yaml")
    assert (saved.teacher.dtype, saved.student.dtype) == ("float32", "float32")


@pytest.mark.parametrize("factor", [0.3, 12.0])
def test_a_precision_that_is_only_emulated_is_warned_of(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slower_by(factor, monkeypatch)
    place = Placement(CPU, rank=0, world_size=1, owns_group=False)
    place.settled_precision(run_config(tmp_path, student={"dtype": "bfloat16"}))
    warned = "student.dtype bfloat16: its products take 12 x as long as in float32 on this processor; write float32"
    assert (warned in caplog.text) == (factor > 1)
    assert "teacher.dtype" not in caplog.text


def test_before_the_launch_auto_contradicts_no_deepspeed_block(tmp_path: Path) -> None:
    config = run_config(tmp_path, student={"dtype": "auto"}, deepspeed={"bf16": {"enabled": True}})
    assert zero.conflicts(config) == []
    settled = precision.with_dtypes(config, "float32")
    assert any("bf16.enabled is True but student.dtype float32 makes it False" in x for x in zero.conflicts(settled))


def test_an_estimate_counts_auto_as_the_device_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower_by(12.0, monkeypatch)
    config = run_config(make_folder(tmp_path), student={"dtype": "auto"})
    assert estimate(config).setup.student_item == 2
    assert estimate(config, device="cpu").setup.student_item == 4
