"""Four ranks over gloo as two copies of two shards: they train, save, resume and export like one process.

Also CPU offload of the teacher, which on a machine without GPU shows that it computes the same and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.tiny_runs import curve, make_folder, run_config

pytestmark = pytest.mark.slow

CLIP = 0.5  # below every norm of this training
SHORT = {"max_steps": 4, "save_every": 2, "export": False}


def run(name: str, *, train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One entry of the worker's list: two copies of two shards, two micro-batches, unless `train` says otherwise."""
    rest = {key: more.pop(key) for key in ("output", "keep") if key in more}
    base = {"parallel": "fsdp", "shard_size": 2, "micro_batch_size": 1, "max_grad_norm": CLIP}
    return {"name": name, "sections": {"train": base | (train or {}), **more}, **rest}


PLAIN = {"export": False}
STATS = {"exchange": "stats", "row_kernel": "eager", "chunk_size": 48, "temperature": 2.0}
RUNS = [
    run("hsdp"),
    run("one_micro_batch", train={**PLAIN, "micro_batch_size": 2}),
    *(run(name, train=PLAIN, distill={**STATS, "exchange": name}) for name in ("weight", "logits", "stats")),
    run("groups_of_one", train={**PLAIN, "shard_size": 1}),
    *(
        run(f"fsdp1_{name}", train={**PLAIN, "parallel": "fsdp1"}, distill={**STATS, "exchange": name})
        for name in ("weight", "logits", "stats")
    ),
    run("fsdp1_offloaded", train={**PLAIN, "parallel": "fsdp1"}, teacher={"offload": True}),
    run("ddp", train={**PLAIN, "parallel": "ddp"}),
    run("replicated_teacher", train=PLAIN, teacher={"sharding": "replicate"}),
    run("offloaded", train=PLAIN, teacher={"offload": True}),
    run("offloaded_replicated", train=PLAIN, teacher={"offload": True, "sharding": "replicate"}),
    run("whole", train=SHORT, distill=STATS, output="saved", keep=2),
    run("resumed", train={**SHORT, "resume": True}, distill=STATS, output="saved", keep=2),
    run("resumed_as_one_group", train={**SHORT, "resume": True, "shard_size": None}, distill=STATS, output="saved"),
]
SAME = [entry["name"] for entry in RUNS if entry["sections"]["train"].get("max_steps") is None]


LAUNCHES = {"runs": Launch(train_worker, ranks=4, spec=RUNS, prepare=make_folder)}


@pytest.fixture(scope="module")
def runs(launched: Callable[[str], Launched]) -> Launched:
    return launched("runs")


@pytest.fixture(scope="module")
def results(runs: Launched) -> dict[str, Any]:
    """By the runs' names, as the first rank saw them."""
    return runs.file("results.pt")[0]


@pytest.fixture(scope="module")
def single(runs: Launched) -> TrainResult:
    return kd.train(run_config(runs.folder, "single", train={"parallel": "single", "max_grad_norm": CLIP}))


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("number", ["loss", "soft_loss", "hard_loss", "grad_norm", "valid_tokens"])
def test_copies_of_shards_train_like_one_process(
    results: dict[str, Any], single: TrainResult, name: str, number: str
) -> None:
    assert min(curve(single, "grad_norm")) > CLIP, "a norm of one copy or shard must be able to show"
    assert curve(results[name], number) == pytest.approx(curve(single, number), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", SAME)
def test_the_same_held_out_text_is_evaluated(results: dict[str, Any], single: TrainResult, name: str) -> None:
    assert results[name]["before"] == pytest.approx(single.before, rel=2e-5)
    assert results[name]["after"] == pytest.approx(single.after, rel=1e-4)


def test_the_export_is_that_of_one_process(results: dict[str, Any], single: TrainResult) -> None:
    expected = load_file(single.export_dir / "model.safetensors")
    found = load_file(Path(results["hsdp"]["export"]) / "model.safetensors")
    assert found.keys() == expected.keys()
    assert max((found[key] - value).abs().max() for key, value in expected.items()) < 1e-5


def test_resuming_continues_bit_for_bit(results: dict[str, Any]) -> None:
    whole, resumed = results["whole"], results["resumed"]
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:]
    assert curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    assert resumed["after"] == whole["after"]


def test_a_checkpoint_of_copies_is_read_by_one_group(results: dict[str, Any]) -> None:
    other = results["resumed_as_one_group"]
    assert curve(other, "step") == [3, 4]
    assert curve(other) == pytest.approx(curve(results["whole"])[2:], rel=1e-5)


def test_all_ranks_hold_the_same_numbers(runs: Launched, results: dict[str, Any]) -> None:
    for rank in (1, 2, 3):
        other = runs.file("results.pt")[rank]
        for name, result in results.items():
            assert curve(other[name]) == curve(result)
            assert other[name]["after"] == result["after"]


def test_the_log_says_how_the_models_lie(runs: Launched) -> None:
    assert "train.shard_size 2: 2 copies of the student" in runs.printed
    assert "teacher.offload has no effect: there is no GPU" in runs.printed
    chosen = [line for line in runs.printed.splitlines() if "distill.exchange: auto ->" in line]
    assert chosen and all("; W 2, " in line or "; W 4, " in line for line in chosen)
    assert sum("; W 2, " in line for line in chosen) >= 4, chosen
