"""Runs with a teacher of torchao's int8 weights: as any other, ahead, compiled, tied, in half precision."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.models.loading import load_teacher
from kd_plugin.settings.run import RunConfig, TeacherConfig
from kd_plugin.settings.yaml_file import load_config
from kd_plugin.training.finite import BrokenWeightsError, check_weights
from kd_plugin.training.preflight import SetupError
from kd_plugin.training.run import TrainResult
from tests.tiny_models import make_model
from tests.tiny_runs import curve, make_folder, run_config

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def config(folder: Path, name: str, quantization: str | None = "int8", **sections: Any) -> RunConfig:
    """A run in one process whose teacher reads as the student does, with `sections` merged over it."""
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", "quantization": quantization}
    teacher |= {"micro_batch_size": None, **sections.pop("teacher", {})}
    train = {"parallel": "single", "export": False, **sections.pop("train", {})}
    return run_config(folder, name, teacher=teacher, train=train, **sections)


@pytest.fixture(scope="module")
def result(folder: Path) -> TrainResult:
    return kd.train(config(folder, "int8"))


def test_the_student_starts_as_without_and_learns_from_another_teacher(folder: Path, result: TrainResult) -> None:
    whole = kd.train(config(folder, "whole", None))
    first, plain = result.history[0], whole.history[0]
    assert first["hard_loss"] == pytest.approx(plain["hard_loss"], rel=1e-6), "cut from the teacher's own weights"
    assert first["teacher_entropy"] != plain["teacher_entropy"]
    assert first["soft_loss"] == pytest.approx(plain["soft_loss"], rel=0.05)
    assert curve(result)[-1] < curve(result)[0]


def test_its_configuration_reads_back(folder: Path, result: TrainResult) -> None:
    assert load_config(result.output_dir / "config.yaml").teacher.quantization == "int8"


@pytest.mark.parametrize("ahead", ["auto", 4, 8])
def test_a_teacher_ahead_changes_nothing(folder: Path, result: TrainResult, ahead: str | int) -> None:
    assert curve(kd.train(config(folder, f"ahead_{ahead}", teacher={"micro_batch_size": ahead}))) == curve(result)


def test_memory_counts_packed_weights_as_they_are_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch, result: TrainResult
) -> None:
    from kd_plugin.training import memory

    counted, measured = [], memory.measured
    monkeypatch.setattr(memory, "measured", lambda size: counted.append(size) or measured(size))
    for quantization in ("int8", None):
        kd.train(config(folder, "counted", quantization, teacher={"micro_batch_size": "auto"}))
    linear = sum(
        module.weight.numel()
        for module in load_teacher(TeacherConfig(model=str(folder / "teacher"), dtype="float32")).model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    rows = 4 * (32 + 16 + 16 + 32 + 64 + 64 + 32)  # each with a scale and a zero
    assert counted[1] - counted[0] == 4 * linear - (linear + 5 * rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_layers_of_both_models_change_nothing(
    folder: Path, result: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        compiled = kd.train(config(folder, "compiled", train={"compile": True}))
    assert "compiled the teacher's LlamaDecoderLayer" in caplog.text and "cannot compile" not in caplog.text
    assert curve(compiled) == pytest.approx(curve(result), rel=1e-5)


def test_a_tied_teacher_in_bfloat16_trains(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tied=True)
    half = config(folder, "half", teacher={"dtype": "bfloat16"}, log={"sample_prompt": "the fox", "sample_tokens": 3})
    result = kd.train(half)
    assert curve(result)[-1] < curve(result)[0]


@pytest.mark.parametrize(
    ("how", "packing"),
    [
        ("int4", "isolated"),
        ("bitsandbytes_4bit", "isolated"),
        ("bitsandbytes_8bit", "joined"),
        ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "isolated"),
    ],
)
def test_every_other_way_to_quantise_trains(tmp_path: Path, how: Any, packing: str) -> None:
    if how != "int4":
        pytest.importorskip("bitsandbytes")
    folder = make_folder(tmp_path)
    teacher = make_model("llama", width=128, vocab_size=64, seed=7, dtype=torch.float32, max_position_embeddings=128)
    teacher.save_pretrained(folder / "teacher")
    student = {"from_teacher": None, "from_config": {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}}
    result = kd.train(config(folder, "other", how, student=student, data={"packing": packing}))
    assert curve(result)[-1] < curve(result)[0]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    model = load_teacher(TeacherConfig(model=str(folder / "teacher"), dtype="float32"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(folder / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "broken" / name).write_bytes((folder / "teacher" / name).read_bytes())
    student = {"from_teacher": None, "model": str(folder / "teacher")}
    with pytest.raises(BrokenWeightsError, match=r"1 weight\(s\) of the teacher .*up_proj"):
        kd.train(config(folder, "broken", teacher={"model": str(folder / "broken")}, student=student))


def test_weights_in_8_bit_floats_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    check_weights(model, "teacher", "here")
    model.weight.data = torch.full((2, 3), math.nan).to(torch.float8_e4m3fn)
    with pytest.raises(BrokenWeightsError, match=r"1 weight\(s\) of the teacher \(here\) hold NaN"):
        check_weights(model, "teacher", "here")


def test_a_quantised_checkpoint_on_several_ranks_is_refused_once_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a hub model, whose config.json is not read before."""
    folder = make_folder(tmp_path)
    load_teacher(TeacherConfig(model=str(folder / "teacher"), dtype="float32", quantization="int8")).save_pretrained(
        folder / "packed"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "packed" / name).write_bytes((folder / "teacher" / name).read_bytes())
    monkeypatch.setattr("kd_plugin.training.preflight_quantization._checkpoint_method", lambda source: "")
    offloaded = {"model": str(folder / "packed"), "offload": True}
    student = {"from_teacher": None, "model": str(folder / "teacher")}
    with pytest.raises(SetupError, match=r"is quantised \(torchao\), but teacher\.offload is true"):
        kd.train(config(folder, "packed", None, teacher=offloaded, student=student))
    result = kd.train(config(folder, "packed", None, teacher={"model": str(folder / "packed")}, student=student))
    assert curve(result)[-1] < curve(result)[0]
