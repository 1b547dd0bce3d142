"""Runs with `train.optimizer: adamw_8bit`: they train, resume bit for bit, and refuse states of another kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kd_plugin as kd
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.metrics_file import read_metrics
from tests.tiny_runs import curve, engine_after_a_step, make_folder, run_config

pytest.importorskip("torchao")

# Wide enough for 8 bits: most matrices have 4096 numbers or more, those of keys and values have not
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a compiler, which takes its time."""
    monkeypatch.setattr("kd_plugin.engines.optimizers.missing_compiler", lambda device: "a test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"), dropout=0.1)


def config(folder: Path, name: str, *, dtype: str = "float32", **train: Any) -> RunConfig:
    student = {"from_teacher": None, "from_config": WIDE, "dtype": dtype}
    train = {"optimizer": "adamw_8bit", "max_steps": 4, "parallel": "single", **train}
    return run_config(folder, name, student=student, train=train)


def test_a_run_trains_like_one_with_states_in_32_bits(folder: Path) -> None:
    narrow, wide = (kd.train(config(folder, name, optimizer=name, export=False)) for name in ("adamw_8bit", "adamw"))
    assert curve(narrow)[0] == curve(wide)[0]
    assert curve(narrow)[-1] < curve(narrow)[0]
    assert curve(narrow) == pytest.approx(curve(wide), rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_too(folder: Path, dtype: str) -> None:
    result = kd.train(config(folder, dtype, dtype=dtype, export=False))
    assert curve(result)[-1] < curve(result)[0]


def test_four_steps_equal_two_and_resume_and_two_bit_for_bit(folder: Path) -> None:
    whole = kd.train(config(folder, "exact", save_every=2))
    assert whole.export_dir is not None
    weights = load_file(whole.export_dir / "model.safetensors")
    shutil.rmtree(whole.output_dir / "checkpoints" / "step_00000004")
    resumed = kd.train(config(folder, "exact", save_every=2, resume=True))
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:] and curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    assert resumed.export_dir is not None
    again = load_file(resumed.export_dir / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_states_of_another_kind_or_of_other_ranks_are_refused(folder: Path) -> None:
    output = kd.train(config(folder, "other", max_steps=2, save_every=2, export=False)).output_dir
    with pytest.raises(checkpoint.CheckpointError, match=r"train\.optimizer adamw_8bit, this run has adamw, whose"):
        kd.train(config(folder, "other", optimizer="adamw", save_every=2, resume=True))
    note = checkpoint.checkpoints(output)[-1] / "run.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "world_size": 2}))
    with pytest.raises(checkpoint.CheckpointError, match=r"was written by 2 ranks, now there are 1: .*wants as many"):
        kd.train(config(folder, "other", save_every=2, resume=True))
    note.write_text(json.dumps({**json.loads(note.read_text()), "world_size": 1}))
    assert kd.train(config(folder, "other", save_every=2, resume=True, export=False)).step == 4


def test_the_best_student_comes_back(folder: Path) -> None:
    """Which reads its states, too."""
    result = kd.train(config(folder, "best", eval_every=1, export_best="kl_t1", learning_rate=0.6, schedule="constant"))
    lines = read_metrics(result.output_dir, until=4)
    evaluated = {line["step"]: line["eval/kl_t1"] for line in lines if line["step"] and "eval/kl_t1" in line}
    assert sorted(evaluated) == [1, 2, 3, 4]
    best = min(evaluated, key=lambda step: evaluated[step])
    assert result.step == best < 4, "not the last"
    assert result.after["kl_t1"] == evaluated[best]


def test_states_that_are_no_numbers_are_seen(folder: Path) -> None:
    from kd_plugin.distributed.torch_internals import inner_tensors
    from kd_plugin.training.finite import has_finite_parameters

    with engine_after_a_step(config(folder, "finite")) as engine:
        assert has_finite_parameters(engine.student, engine.torch_optimizer)
        assert engine.torch_optimizer is not None
        moments = [state["exp_avg_sq"].to_local() for state in engine.torch_optimizer.state.values()]
        packed = next(moment for moment in moments if len(inner_tensors(moment)) > 1)
        inner_tensors(packed)[1][2] = float("inf")  # a scale
        assert not has_finite_parameters(engine.student, engine.torch_optimizer)
