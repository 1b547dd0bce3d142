"""Quantised teachers and 8-bit optimizers: what does not go together is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import early_problems, idle_settings
from tests.tiny_runs import run_config

STAGE_2 = {"zero_optimization": {"stage": 2}}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is one of the faults, and has its own test."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "kd_plugin.settings.extras.importlib.util.find_spec",
        lambda name: object() if name in ("torchao", "bitsandbytes") else find(name),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher of which there is a config.json only, and a text."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a")
    return tmp_path


def config(folder: Path, **sections: Any) -> RunConfig:
    teacher = {"quantization": "int8", "sharding": "replicate", **sections.pop("teacher", {})}
    return run_config(folder, teacher=teacher, **sections)


def problems(run: RunConfig, mode: str | None = None, world_size: int | None = None) -> list[str]:
    return early_problems(run, mode=mode, world_size=world_size, accumulation=1)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp", "fsdp1", "deepspeed"])
def test_a_quantised_teacher_that_is_whole_on_each_rank_runs_in_every_mode(folder: Path, mode: str) -> None:
    assert problems(config(folder, deepspeed=STAGE_2), mode, 1 if mode == "single" else 2) == []


def test_zero3s_own_linear_layers_are_not_for_torchaos_weights(folder: Path) -> None:
    cure = "set deepspeed.zero_optimization.memory_efficient_linear to false"
    for block in (None, {"zero_optimization": {"stage": 3}}):
        (line,) = problems(config(folder, deepspeed=block or {}), "deepspeed", 2)
        assert line.startswith("teacher.quantization is int8, but ZeRO-3 replaces") and line.endswith(cure)
    plain = {"zero_optimization": {"memory_efficient_linear": False}}
    assert problems(config(folder, deepspeed=plain), "deepspeed", 2) == []
    bitsandbytes = {"quantization": "bitsandbytes_4bit"}
    assert problems(config(folder, teacher=bitsandbytes), "deepspeed", 2) == [], "which has layers of its own"


@pytest.mark.parametrize("mode", [None, "ddp", "fsdp", "fsdp1", "deepspeed"])
def test_it_is_not_cut_over_ranks(folder: Path, mode: str | None) -> None:
    cut = config(folder, teacher={"sharding": "shard"}, deepspeed=STAGE_2)
    (line,) = problems(cut, mode, None if mode is None else 2)
    assert line.startswith("teacher.quantization is int8, but teacher.sharding is shard")
    assert line.endswith("set teacher.sharding to replicate")


def test_one_process_cuts_nothing(folder: Path) -> None:
    alone = config(folder, teacher={"sharding": "shard"}, deepspeed=STAGE_2)
    assert problems(alone, "single", 1) == [] and problems(alone, "deepspeed", 1) == []
    assert problems(config(folder, teacher={"sharding": "shard"}, train={"parallel": "single"})) == []
    quiet = config(folder, train={"parallel": "single"})
    assert idle_settings(quiet, "single") == [], "what several ranks would want is no idle setting"


@pytest.mark.parametrize("mode", ["single", "fsdp", "deepspeed"])
def test_it_is_not_offloaded(folder: Path, mode: str) -> None:
    found = problems(config(folder, teacher={"offload": True}), mode, 1)
    assert any("teacher.offload is true" in line and line.endswith("set teacher.offload to false") for line in found)


def test_a_checkpoint_that_is_quantised_is_a_quantised_teacher(folder: Path) -> None:
    (folder / "teacher" / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    whole = {"quantization": None, "offload": True, "sharding": "shard"}
    found = problems(config(folder, teacher=whole), "fsdp", 2)
    where = f"teacher.model {folder / 'teacher'}"
    assert sum(f"{where} is quantised (gptq), but teacher.{key}" in line for line in found for key in whole) == 2
    assert sum("student.from_teacher: the weights of" in line for line in found) == 1
    (cut, twice) = sorted(problems(config(folder), "fsdp", 2), key=len)[-2:]
    assert any("quantised already (gptq): leave teacher.quantization out" in line for line in (cut, twice))


def test_a_checkpoint_that_transformers_may_unpack_is_judged_when_it_is_loaded(folder: Path) -> None:
    (folder / "teacher" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    assert problems(config(folder, teacher={"quantization": None, "sharding": "shard"}), "fsdp", 2) == []


def test_a_quantised_checkpoint_is_no_student(folder: Path) -> None:
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    student = {"from_teacher": None, "model": str(folder / "student")}
    (line,) = problems(config(folder, student=student))
    assert line.startswith("student.model") and "is quantised (gptq), and a student is trained in fp32" in line
    assert problems(config(folder, student={**student, "from_config": {"vocab_size": 9}})) == [], "weights are not read"


def test_llm_int8_does_not_keep_documents_apart(folder: Path) -> None:
    mixed = {"quantization": "bitsandbytes_8bit"}
    (line,) = problems(config(folder, teacher=mixed), "single", 1)
    assert line.startswith("teacher.quantization is bitsandbytes_8bit (LLM.int8), by whose outliers")
    assert problems(config(folder, teacher=mixed, data={"packing": "joined"}), "single", 1) == []
    for block in ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, {"load_in_4bit": True}, "bitsandbytes_4bit"):
        assert problems(config(folder, teacher={"quantization": block}), "single", 1) == []
    assert len(problems(config(folder, teacher={"quantization": {"load_in_8bit": True}}), "single", 1)) == 1


@pytest.mark.parametrize(
    ("mode", "cure"), [("deepspeed", "whose states ZeRO cannot cut"), ("fsdp1", "whose states FSDP1 cannot put")]
)
def test_states_in_8_bits_are_not_for_every_wrapper(folder: Path, mode: str, cure: str) -> None:
    run = run_config(folder, train={"optimizer": "adamw_8bit", "parallel": mode})
    for resolved, world_size in ((mode, 2), (None, None)):
        (line,) = problems(run, resolved, world_size)
        assert line.startswith("train.optimizer is adamw_8bit") and cure in line and "train.parallel to fsdp" in line
    for other in ("single", "ddp", "fsdp"):
        assert problems(run_config(folder, train={"optimizer": "adamw_8bit"}), other, 2) == []


def test_an_optimizer_of_deepspeeds_leaves_it_idle(folder: Path) -> None:
    block = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    run = run_config(folder, train={"optimizer": "adamw_8bit", "parallel": "deepspeed"}, deepspeed=block)
    assert problems(run, "deepspeed", 2) == []
    assert any(line.startswith("train.optimizer has no effect") for line in idle_settings(run, "deepspeed"))


def test_a_teacher_without_a_word_to_say_is_quantised_for_nothing(folder: Path) -> None:
    lines = idle_settings(config(folder, distill={"soft_weight": 0.0, "temperature": 1.0}))
    assert "teacher.quantization has no effect: distill.soft_weight is 0" in lines


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"teacher": {"quantization": "int8", "sharding": "replicate"}},
            "torchao is not installed and teacher.quantization needs it: pip install 'kd-plugin[quantize]'",
        ),
        (
            {"teacher": {"quantization": "bitsandbytes_4bit", "sharding": "replicate"}},
            "bitsandbytes is not installed and teacher.quantization needs it: pip install bitsandbytes",
        ),
        (
            {"train": {"optimizer": "adamw_8bit"}},
            "torchao is not installed and train.optimizer adamw_8bit needs it: pip install 'kd-plugin[quantize]'",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_its_cure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(
        "kd_plugin.settings.extras.importlib.util.find_spec",
        lambda name: None if name in ("torchao", "bitsandbytes") else object(),
    )
    assert problems(run_config(folder, **sections), "single", 1) == [line]
