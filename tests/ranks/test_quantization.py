"""Two ranks with a quantised teacher, or with optimizer states in 8 bits, train like one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.train_entries import run
from tests.tiny_runs import assert_same_steps, curve, make_folder, run_config

pytest.importorskip("torchao")

QUANTISED = {"quantization": "int8", "sharding": "replicate"}
# Wide enough for 8 bits on each of two ranks
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
NARROW = {"optimizer": "adamw_8bit", "max_steps": 4, "export": False}
STUDENT = {"from_teacher": None, "from_config": WIDE}
SAVED = {**NARROW, "save_every": 2}
# As the refusal of ZeRO-3 with DeepSpeed's own linear layers says
PLAIN_LINEAR = {"deepspeed": {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}}}
TEACHERS = [
    *(
        run(f"{name}_int8", name, train={"export": False}, teacher=QUANTISED)
        for name in ("fsdp", "ddp", "fsdp1", "zero2")
    ),
    run("zero3_int8", "zero3", train={"export": False}, teacher=QUANTISED, **PLAIN_LINEAR),
]
STATES = [
    *(run(f"{name}_8bit", name, train=NARROW, student=STUDENT) for name in ("fsdp", "ddp")),
    *(
        entry
        for name in ("fsdp", "ddp")
        for entry in (
            run(f"{name}_whole", name, train=SAVED, student=STUDENT, output=f"{name}_8bit_saved", keep=2),
            run(f"{name}_resumed", name, train={**SAVED, "resume": True}, student=STUDENT, output=f"{name}_8bit_saved"),
        )
    ),
    run("fsdp_fp16", "fsdp", train=NARROW, student={**STUDENT, "dtype": "float16"}),
]
LAUNCHES = {
    "teachers": Launch(train_worker, ranks=2, spec=TEACHERS, prepare=make_folder, needs_deepspeed=True),
    "states": Launch(train_worker, ranks=2, spec=STATES, prepare=make_folder, timeout_s=900),
}


@pytest.fixture(scope="module")
def teachers(launched: Callable[[str], Launched]) -> tuple[dict[str, Any], TrainResult]:
    """The runs with a quantised teacher by name, and the same in one process."""
    runs = launched("teachers")
    single = kd.train(run_config(runs.folder, "single", train={"parallel": "single"}, teacher=QUANTISED))
    return runs.file("results.pt")[0], single


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry["name"] for entry in TEACHERS])
def test_a_quantised_teacher_on_each_rank_changes_nothing(
    teachers: tuple[dict[str, Any], TrainResult], name: str
) -> None:
    results, single = teachers
    assert_same_steps(results[name], single)


@pytest.fixture(scope="module")
def states(launched: Callable[[str], Launched]) -> tuple[dict[str, Any], TrainResult]:
    """The runs with 8-bit states by name, and one of them in one process."""
    runs = launched("states")
    train = {**NARROW, "parallel": "single"}
    return runs.file("results.pt")[0], kd.train(run_config(runs.folder, "single", train=train, student=STUDENT))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp_8bit", "ddp_8bit"])
def test_states_in_8_bits_train_alike_on_two_ranks(states: tuple[dict[str, Any], TrainResult], name: str) -> None:
    results, single = states
    assert curve(results[name]) == pytest.approx(curve(single), rel=1e-3)
    assert curve(results[name])[0] == pytest.approx(curve(single)[0], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_resuming_with_8_bits_continues_bit_for_bit(states: tuple[dict[str, Any], TrainResult], name: str) -> None:
    whole, resumed = states[0][f"{name}_whole"], states[0][f"{name}_resumed"]
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:]
    assert curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    assert resumed["after"] == whole["after"]


@pytest.mark.slow
def test_fp16s_loss_scale_goes_with_8_bits(states: tuple[dict[str, Any], TrainResult]) -> None:
    results, single = states
    assert curve(results["fsdp_fp16"])[-1] < curve(results["fsdp_fp16"])[0]
    assert curve(results["fsdp_fp16"]) == pytest.approx(curve(single), rel=0.05)
