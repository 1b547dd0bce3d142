"""What the loss holds under DeepSpeed's `torch_autocast`, by the estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_plugin.estimate.account import estimate
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("device", "item"), [("cpu", 4), ("cuda", 2)])
def test_autocast_takes_a_copy_of_each_fp32_head(folder: Path, device: str, item: int) -> None:
    block = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    plain, under = (
        estimate(run_config(folder, train={"parallel": "deepspeed"}, deepspeed=given), world_size=2, device=device)
        for given in ({}, block)
    )
    copies = under.memory.phase_bytes("loss") - plain.memory.phase_bytes("loss")
    assert copies == 2 * item * 64 * 32, "V 64, D and E 32"
