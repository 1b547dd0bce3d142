"""Two ranks whose layers are compiled train like those whose layers are not, under every wrapper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import compile_worker, train_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.train_entries import run
from tests.tiny_runs import curve, make_folder, run_config

pytestmark = pytest.mark.slow
SAMPLED = {"sample_prompt": "the fox", "sample_tokens": 3}
RECOMPUTED = {"activation_checkpointing": True}


def compiled(name: str, of: str, *, teacher: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return run(name, of, train={"compile": True, **train}, log=SAMPLED, teacher=teacher or {})


# The layers' graphs as captured, and by Inductor
CAPTURED = [compiled("fsdp_recomputed", "fsdp", **RECOMPUTED)]
MORE = [
    compiled("fsdp", "fsdp"),
    compiled("ddp", "ddp"),
    compiled("fsdp1", "fsdp1"),
    compiled("fsdp1_recomputed", "fsdp1", **RECOMPUTED),
]
MORE += [
    compiled("fsdp_offloaded", "fsdp", teacher={"offload": True}),
    compiled("zero1", "zero1"),
    compiled("zero2", "zero2"),
]
MORE += [compiled("zero2_whole_teacher", "zero2", teacher={"sharding": "replicate"}, **RECOMPUTED)]
BY_INDUCTOR = [compiled("fsdp_inductor", "fsdp"), compiled("fsdp_inductor_recomputed", "fsdp", **RECOMPUTED)]
BY_INDUCTOR += [compiled("ddp_inductor", "ddp"), compiled("zero2_inductor", "zero2")]
OF_LAUNCH = {"quick": CAPTURED, "more": MORE, "inductor": BY_INDUCTOR}

LAUNCHES = {
    "quick": Launch(compile_worker, ranks=2, spec=CAPTURED, prepare=make_folder, timeout_s=600),
    "more": Launch(compile_worker, ranks=2, spec=MORE, prepare=make_folder, needs_deepspeed=True, timeout_s=900),
    "inductor": Launch(
        train_worker, ranks=2, spec=BY_INDUCTOR, prepare=make_folder, needs_deepspeed=True, timeout_s=1200
    ),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """One process whose layers are not compiled."""
    folder = make_folder(tmp_path_factory.mktemp("eager"))
    return kd.train(run_config(folder, train={"parallel": "single"}))


CASES = [(launch, entry["name"]) for launch, entries in OF_LAUNCH.items() for entry in entries]


@pytest.mark.parametrize(("launch", "name"), CASES)
def test_compiled_layers_train_like_eager_ones(
    launched: Callable[[str], Launched], single: TrainResult, launch: str, name: str
) -> None:
    result = launched(launch).file("results.pt")[0][name]
    assert curve(result) == pytest.approx(curve(single), rel=1e-5)
    assert curve(result, "grad_norm") == pytest.approx(curve(single, "grad_norm"), rel=1e-4)
    assert result["after"] == pytest.approx(single.after, rel=1e-5)
    assert single.export_dir is not None
    expected = load_file(single.export_dir / "model.safetensors")
    found = load_file(Path(result["export"]) / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


@pytest.mark.parametrize("launch", ["quick", "more"])
def test_the_layers_were_compiled_on_both_ranks(launched: Callable[[str], Launched], launch: str) -> None:
    graphs = launched(launch).file("graphs.pt")
    assert min(graphs) >= 2 * len(OF_LAUNCH[launch]), "a training and an evaluation graph for each run"
    said = [line for line in launched(launch).printed.splitlines() if "compiled the student's" in line]
    assert len(said) == 2 * len(OF_LAUNCH[launch])
    assert "runs eager" not in launched(launch).printed.replace("the teacher runs eager under ZeRO-3", "")
