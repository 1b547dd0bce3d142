"""Precisions that a device lacks: refused where they were asked for, left out where `auto` chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kd_plugin as kd
from kd_plugin.engines import zero_block
from kd_plugin.engines.process_group import Placement
from kd_plugin.estimate.account import estimate
from kd_plugin.loss import checks
from kd_plugin.training import precision, run
from kd_plugin.training.precision import settled_precision
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config

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
    monkeypatch.setattr(run, "_load", lambda *arguments: pytest.fail("a model was loaded"))
    place = Placement(volta, rank=0, world_size=1, owns_group=False)
    with pytest.raises(ValueError, match=f"{role}.dtype is bfloat16, which Tesla V100"):
        run._train(config, place, "single")


# -- dtype: auto --------------------------------------------------------------------------------------------


def processor_with(monkeypatch: pytest.MonkeyPatch, *sets: str) -> None:
    """A processor with these instruction sets, among those that have half-precision products."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(sets, True))


@pytest.mark.parametrize(
    ("sets", "chosen"),
    [
        (("avx2", "avx512_f", "avx512_bf16"), "bfloat16"),
        (("avx512_f", "amx_tile", "amx_bf16"), "bfloat16"),
        (("neon", "bf16"), "bfloat16"),
        (("avx2", "avx512_f", "avx512_fp16"), "float32"),
        (("neon", "fp16_arith"), "float32"),
        (("avx2",), "float32"),
    ],
)
def test_auto_is_what_the_processor_multiplies_by_itself(
    sets: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_with(monkeypatch, *sets)
    found, why = precision.automatic_dtype(CPU)
    assert found == chosen and ("none of" if chosen == "float32" else sets[-1]) in why


def test_a_build_without_onednn_uses_no_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    processor_with(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.automatic_dtype(CPU)[0] == "float32"


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
    processor_with(monkeypatch, "avx2")
    both = {role: {"dtype": "auto"} for role in ("teacher", "student")}
    config = run_config(make_folder(tmp_path), train={"max_steps": 1}, **both)
    with caplog.at_level(logging.INFO):
        result = kd.train(config)
    assert "dtype: auto -> float32 (this processor has none of amx_bf16, avx512_bf16" in caplog.text
    saved = kd.load_config(result.output_dir / "config.yaml")
    assert (saved.teacher.dtype, saved.student.dtype) == ("float32", "float32")


@pytest.mark.parametrize("native", [True, False])
def test_a_precision_that_is_only_emulated_is_warned_of(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor_with(monkeypatch, "amx_bf16" if native else "avx512_f")
    place = Placement(CPU, rank=0, world_size=1, owns_group=False)
    settled_precision(run_config(tmp_path, student={"dtype": "bfloat16"}), place)
    warned = "student.dtype bfloat16 is emulated: this processor has none of amx_bf16, avx512_bf16, bf16, sve_bf16"
    assert (warned in caplog.text) == (not native)
    assert "teacher.dtype" not in caplog.text


def test_before_the_launch_auto_contradicts_no_deepspeed_block(tmp_path: Path) -> None:
    config = run_config(tmp_path, student={"dtype": "auto"}, deepspeed={"bf16": {"enabled": True}})
    assert zero_block.conflicts(config) == []
    settled = precision.with_dtypes(config, "float32")
    assert any(
        "bf16.enabled is True but student.dtype float32 makes it False" in x for x in zero_block.conflicts(settled)
    )


def test_an_estimate_counts_auto_as_the_device_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor_with(monkeypatch, "avx2")
    config = run_config(make_folder(tmp_path), student={"dtype": "auto"})
    assert estimate(config).setup.student_item == 2
    assert estimate(config, device="cpu", speeds=SPEEDS).setup.student_item == 4
