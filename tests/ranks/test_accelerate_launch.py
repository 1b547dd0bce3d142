"""`accelerate launch`, for real, on two CPU ranks: the examples train under DDP, FSDP2, ZeRO-2 and ZeRO-3 alike."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks.launch import ENVIRONMENT, REPOSITORY

SHARDED = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
SHARDED += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--fsdp_cpu_ram_efficient_loading", "false"]
WRAPPERS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": SHARDED,
    "zero2": ["--use_deepspeed", "--zero_stage", "2"],
    "zero3": ["--use_deepspeed", "--zero_stage", "3"],
}
COMMON = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
COMMON += ["--main_process_port", "0"]

Losses = Callable[[str], list[float]]
EXAMPLES = ("accelerate_loop.py", "hf_trainer.py", "trl_on_policy.py")

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def losses(example: str, wrapper: str, folder: Path) -> list[float]:
    """The losses that an example prints; what it prints them with is its own affair."""
    if wrapper.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *COMMON, *WRAPPERS[wrapper]]
    script = [str(REPOSITORY / "tests" / "ranks" / "on_cpus.py"), str(REPOSITORY / "launch" / "examples" / example)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [*command, *script, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(value) for value in re.findall(r"(?<![\w_])loss'?:? '?(\d+\.\d+)", done.stdout)]


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return functools.cache(lambda example: losses(example, "ddp", tmp_path_factory.mktemp("ddp")))


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("wrapper", ["fsdp2", "zero2", "zero3"])
def test_the_wrappers_agree(
    under_ddp: Callable[[str], list[float]], tmp_path: Path, example: str, wrapper: str
) -> None:
    found = losses(example, wrapper, tmp_path)
    assert len(found) >= 3 and found == pytest.approx(under_ddp(example), abs=2e-3)  # as many digits are printed
