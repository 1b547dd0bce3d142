"""Two ranks over gloo: every parallel layout trains like one process, saves, resumes and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.train_entries import run
from tests.tiny_runs import assert_same_steps, curve, make_folder, run_config

LAYOUTS = ("fsdp", "fsdp1", "ddp", "zero0", "zero1", "zero2", "zero3")


HALF = [(name, dtype) for name in ("fsdp", "fsdp1") for dtype in ("bfloat16", "float16")]
HALF += [("zero0", "bfloat16"), ("zero3", "bfloat16")]
SAVING = ("fsdp", "fsdp1", "ddp", "zero2", "zero3")
SAVED = {"max_steps": 4, "save_every": 2}
# A rate that grows until it ruins the student; with AdamW's usual epsilon each sign of a small gradient would be told
RUINED = {"max_steps": 12, "eval_every": 1, "learning_rate": 10.0, "warmup_steps": 40, "schedule": "constant"}
RUINED |= {"adam_eps": 0.1, "export_best": "hard_loss", "stop_on": {"metric": "hard_loss", "patience": 2}}
RUNS = [
    *(run(name, name) for name in LAYOUTS),
    run("fsdp_1x4", "fsdp", train={"micro_batch_size": 1, "export": False}),
    *(
        entry
        for name in SAVING
        for entry in (
            run(f"{name}_whole", name, train=SAVED, output=f"{name}_saved", keep=2),
            run(f"{name}_resumed", name, train={**SAVED, "resume": True}, output=f"{name}_saved"),
        )
    ),
    *(
        run(f"{name}_sampled", name, train={"max_steps": 1}, log={"sample_prompt": "the fox", "sample_tokens": 4})
        for name in ("fsdp1", "zero3")
    ),
]
MORE = [
    run("zero3_1x4", "zero3", train={"micro_batch_size": 1, "export": False}),
    run("zero2_4x1", "zero2", train={"micro_batch_size": 4, "export": False}),
    *(
        run(f"{name}_replicated", name, train={"export": False}, teacher={"sharding": "replicate"})
        for name in ("fsdp", "fsdp1", "zero3")
    ),
    *(
        run(f"{name}_recomputed", name, train={"export": False, "activation_checkpointing": True})
        for name in ("fsdp", "fsdp1", "zero3")
    ),
    run("zero3_offloaded", "zero3", train={"export": False}, teacher={"offload": True}),
    *(run(f"{name}_ruined", name, train=RUINED) for name in ("fsdp", "fsdp1", "zero3")),
    *(run(f"{name}_{dtype}", name, student={"dtype": dtype}) for name, dtype in HALF),
]


LAUNCHES = {
    "runs": Launch(train_worker, ranks=2, spec=RUNS, prepare=make_folder, together="deepspeed", needs_deepspeed=True),
    "more": Launch(train_worker, ranks=2, spec=MORE, prepare=make_folder, needs_deepspeed=True),
}


@pytest.fixture(scope="module")
def runs(launched: Callable[[str], Launched]) -> Launched:
    return launched("runs")


@pytest.fixture(scope="module")
def results(runs: Launched) -> dict[str, Any]:
    """By the runs' names, as the first rank saw them."""
    return runs.file("results.pt")[0]


@pytest.fixture(scope="module")
def single(runs: Launched) -> TrainResult:
    return kd.train(run_config(runs.folder, "single", train={"parallel": "single"}))


@pytest.fixture(scope="module")
def more(launched: Callable[[str], Launched]) -> tuple[dict[str, Any], TrainResult]:
    """The further runs by name, and the same in one process."""
    runs = launched("more")
    single = kd.train(run_config(runs.folder, "single", train={"parallel": "single"}))
    first, other = runs.file("results.pt")
    assert all(curve(other[name]) == curve(result) for name, result in first.items())
    return first, single


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("number", ["loss", "soft_loss", "hard_loss", "grad_norm", "top1_agreement", "valid_tokens"])
def test_two_ranks_train_like_one_process(results: dict[str, Any], single: TrainResult, name: str, number: str) -> None:
    assert curve(results[name], number) == pytest.approx(curve(single, number), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", [*LAYOUTS, "fsdp_1x4"])
def test_the_same_held_out_text_is_evaluated(results: dict[str, Any], single: TrainResult, name: str) -> None:
    assert results[name]["before"] == pytest.approx(single.before, rel=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_export_what_one_process_exports(results: dict[str, Any], single: TrainResult, name: str) -> None:
    expected = load_file(single.export_dir / "model.safetensors")
    found = load_file(Path(results[name]["export"]) / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert (found[key] - value).abs().max() < 1e-5, key


OTHERWISE = ["zero3_1x4", "zero2_4x1", "fsdp_replicated", "fsdp1_replicated", "zero3_replicated"]
OTHERWISE += ["zero3_offloaded", *(f"{name}_recomputed" for name in ("fsdp", "fsdp1", "zero3"))]


def test_micro_batches_change_nothing(results: dict[str, Any], single: TrainResult) -> None:
    assert_same_steps(results["fsdp_1x4"], single)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_micro_batches_recomputation_and_the_teachers_layout_change_nothing(
    more: tuple[dict[str, Any], TrainResult], name: str
) -> None:
    results, single = more
    assert_same_steps(results[name], single)


@pytest.mark.parametrize("name", SAVING)
def test_resuming_continues_bit_for_bit(results: dict[str, Any], name: str) -> None:
    whole, resumed = results[f"{name}_whole"], results[f"{name}_resumed"]
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:]
    assert curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    assert resumed["after"] == whole["after"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_half_precision_follows_full_precision(more: tuple[dict[str, Any], TrainResult], name: str, dtype: str) -> None:
    results, single = more
    result = results[f"{name}_{dtype}"]
    assert curve(result) == pytest.approx(curve(single), rel=0.03)
    assert curve(result) != curve(single)
    exported = load_file(Path(result["export"]) / "model.safetensors")
    assert {str(value.dtype) for value in exported.values()} == {f"torch.{dtype}"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp1", "zero3"])
def test_all_ranks_stop_together_and_export_the_best_student(
    launched: Callable[[str], Launched], more: tuple[dict[str, Any], TrainResult], name: str
) -> None:
    found = more[0][f"{name}_ruined"]
    single = kd.train(run_config(launched("more").folder, "single_ruined", train={**RUINED, "parallel": "single"}))
    assert found["step"] == single.step < single.history[-1]["step"] == len(found["history"]) < RUINED["max_steps"]
    assert found["after"] == pytest.approx(single.after, rel=1e-3)
    exported = load_file(Path(found["export"]) / "model.safetensors")
    for key, value in load_file(single.export_dir / "model.safetensors").items():
        assert (exported[key] - value).abs().max() < 1e-3, key


def test_all_ranks_hold_the_same_numbers(runs: Launched, results: dict[str, Any]) -> None:
    other = runs.file("results.pt")[1]
    for name, result in results.items():
        assert curve(other[name]) == curve(result)
        assert other[name]["after"] == result["after"]


def test_only_rank_zero_speaks_and_says_what_was_filled_in(runs: Launched) -> None:
    lines = runs.printed.splitlines()
    finished = [line for line in lines if line.startswith("step 5/5 loss")]
    assert len(finished) == sum("max_steps" not in entry["sections"]["train"] for entry in RUNS)
    assert any(
        "deepspeed.train_batch_size: 8 (micro_batch_size 2 x accumulation 2 x 2 ranks)" in line for line in lines
    )


@pytest.mark.parametrize("name", ["fsdp1", "zero3"])
def test_sharded_models_continue_a_prompt(runs: Launched, name: str) -> None:
    samples = json.loads((runs.folder / f"{name}_sampled" / "summary.json").read_text())["samples"]
    assert samples["prompt"] == "the fox" and samples["teacher"] and samples["student"] is not None
