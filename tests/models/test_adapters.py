"""Adapters on a student: what is trained, what a merged model computes, what its folder says, what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_plugin.models.adapters import add_adapters, merged_student
from kd_plugin.models.loading import build_student
from kd_plugin.models.students import StudentError
from kd_plugin.settings.lora import LoraConfig
from kd_plugin.settings.run import RunConfig, StudentConfig
from kd_plugin.training.preflight_models import missing_packages
from tests.refusals import refused
from tests.six_layer_models import from_teacher, make_teacher, tokens
from tests.tiny_models import make_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def adapted(**lora: Any) -> nn.Module:
    """Three layers of a Llama with adapters."""
    return build_student(from_teacher(3, lora=LoraConfig(r=3, **lora)), make_teacher("llama"), seed=0)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model: nn.Module) -> None:
    """A zero lora_B would hide what goes wrong behind it."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trained(model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adapters_alone_are_trained_and_change_nothing_before_a_step() -> None:
    teacher = make_teacher("llama")
    plain = build_student(from_teacher(3), teacher, seed=0)
    state = torch.random.get_rng_state()
    student = build_student(from_teacher(3, lora=LoraConfig(r=3)), teacher, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(student) is type(plain) and student.training
    torch.testing.assert_close(student(tokens()).logits, plain(tokens()).logits, rtol=0, atol=0)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(student))
    linear = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(trained(student)) == 2 * len(linear) > 0
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


def test_the_seed_decides_the_adapters() -> None:
    def down(seed: int) -> Tensor:
        student = build_student(from_teacher(2, lora=LoraConfig()), make_teacher("llama"), seed=seed)
        return next(value for name, value in trained(student).items() if "lora_A" in name)

    assert torch.equal(down(5), down(5)) and not torch.equal(down(5), down(6))


def test_what_is_trained_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        student = adapted(target_modules=("q_proj", "v_proj"))
    (line,) = [message for message in caplog.messages if message.startswith("student.lora: ")]
    share = sum(p.numel() for p in trained(student).values()) / sum(p.numel() for p in student.parameters())
    assert "6 layers have adapters (q_proj, v_proj)" in line and f"{100 * share:.2f} %" in line


def test_experts_without_adapters_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model("gpt_oss", dtype=torch.float32).save_pretrained(tmp_path)
    student = build_student(StudentConfig(model=str(tmp_path), lora=LoraConfig()), make_model("llama"), seed=0)
    (line,) = [message for message in caplog.messages if "are those of experts" in message]
    count = sum(p.numel() for name, p in student.named_parameters() if ".experts." in name and p.ndim == 3)
    assert line.startswith(f"student.lora: {count / 1e6:.1f}M parameters")


def test_a_module_trained_whole_is_the_one_of_that_name() -> None:
    """Letters alone would take `norm` for every layer's `input_layernorm`, too."""
    student = adapted(target_modules=("q_proj",), modules_to_save=("norm",))
    whole = [name for name in trained(student) if "lora_" not in name]
    assert whole == ["model.norm.modules_to_save.default.weight"]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama_tied", {}),
    "transposed layers": ("gpt2", {}),
    "softcap": ("gemma2", {"use_rslora": True}),
    "by name": ("llama", {"target_modules": ("q_proj", "down_proj"), "lora_dropout": 0.5}),
    "by expression": ("llama", {"target_modules": r".*\.0\..*_proj"}),
    "head": ("llama", {"target_modules": ("q_proj", "lm_head")}),
    "embedding": ("llama", {"target_modules": ("embed_tokens", "lm_head")}),
    "whole": ("llama", {"target_modules": ("q_proj",), "modules_to_save": ("lm_head", "norm")}),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_and_as_an_adapter_on_its_base_the_student_computes_the_same(name: str, tmp_path: Path) -> None:
    architecture, settings = CASES[name]
    make_model(architecture, dtype=torch.float32).save_pretrained(tmp_path / "base")
    source = StudentConfig(model=str(tmp_path / "base"), lora=LoraConfig(r=3, lora_alpha=5, **settings))
    student = build_student(source, make_model("llama"), seed=1).eval()
    randomise(student)
    with torch.no_grad():
        wanted = student(tokens()).logits
    plain = type(student)(student.config)
    merged = merged_student(plain, source, student.state_dict(), folder=tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")

    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert not torch.allclose(base(tokens()).logits, wanted, atol=1e-2), "the adapters do something"
        torch.testing.assert_close(reloaded(tokens()).logits, wanted, rtol=1e-5, atol=1e-5)
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(again(tokens()).logits, wanted, rtol=1e-6, atol=1e-6)
    assert not hasattr(reloaded, "peft_config") and type(reloaded) is type(base)


def test_an_adapter_s_folder_names_its_base_and_peft_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    source = StudentConfig(model="./base", revision="v2", lora=LoraConfig(r=2, lora_alpha=6, use_rslora=True))
    student = build_student(source, make_model("llama"), seed=1).eval()
    randomise(student)
    merged_student(type(student)(student.config), source, student.state_dict(), folder=tmp_path / "x" / "adapter")
    config = json.loads((tmp_path / "x" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["revision"] == "v2"
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6, True)
    assert config["target_modules"] == sorted(config["target_modules"])
    monkeypatch.chdir("/")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "x" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(found(tokens()).logits, student(tokens()).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ("q_proj", "qq_proj")}, ["target_modules", "'qq_proj'", "k_proj, lm_head"]),
        ({"modules_to_save": ("norms",)}, ["modules_to_save", "'norms'"]),
        ({"target_modules": "nothing.*"}, ["student.lora: ", "not found"]),
        ({"target_modules": ("self_attn",)}, ["student.lora: ", "not supported"]),
        ({"modules_to_save": ("layers",)}, ["student.lora: ", "No modules were targeted"]),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StudentError):
        adapted(**settings)
    refused(lambda: adapted(**settings), *words)


@pytest.mark.parametrize("settings", [{"target_modules": ("lm_head",)}, {"modules_to_save": ("embed_tokens",)}])
def test_a_head_that_is_tied_to_its_embedding_is_left_out(settings: dict[str, Any]) -> None:
    teacher = make_teacher("llama_tied")
    student = build_student(from_teacher(2), teacher, seed=0)
    refused(lambda: add_adapters(student, LoraConfig(**settings), seed=0), "tied", "leave both out")


def test_freezing_takes_adapters_away_and_says_where_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    def student(*patterns: str) -> nn.Module:
        config = from_teacher(3, lora=LoraConfig(), freeze=list(patterns))
        return build_student(config, make_teacher("llama"), seed=0)

    assert trained(student("layers.0.")).keys() == {name for name in trained(student()) if "layers.0." not in name}
    assert "has no effect" not in caplog.text
    assert trained(student("embed_tokens")).keys() == trained(student()).keys()
    assert "student.freeze: 'embed_tokens' has no effect: student.lora trains none of these" in caplog.text
    refused(lambda: student("lora_"), "every parameter is frozen")


def test_without_peft_the_cure_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    values = {"teacher": {"model": "m"}, "student": {"model": "m", "lora": {}}}
    lines = missing_packages(RunConfig.model_validate(values))
    assert "peft is not installed and student.lora needs it: pip install 'kd-plugin[train]'" in lines
    values["student"] = {"model": "m"}
    assert not any("peft" in line for line in missing_packages(RunConfig.model_validate(values)))
