"""Estimates of a student with adapters: what is trained, and what is not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd_plugin.estimate.account import Estimate, estimate
from kd_plugin.estimate.setup import keeps_student_head
from kd_plugin.estimate.tables import tables_of
from kd_plugin.models.loading import build_student
from kd_plugin.settings.run import RunConfig
from tests.tiny_models import make_model

SIZES = {"num_hidden_layers": 3, "vocab_size": 997, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations alone; there are no weights."""
    folder = tmp_path_factory.mktemp("configurations")
    for name, width in (("student", 64), ("teacher", 96)):
        make_model("llama", width=width, **SIZES).config.save_pretrained(folder / name)
    return folder


def config_of(folder: Path, lora: dict[str, Any] | None, *, parallel: str = "fsdp", **student: Any) -> RunConfig:
    models = {name: {"model": str(folder / name), "dtype": "float32"} for name in ("student", "teacher")}
    models["student"] |= {"lora": lora, **student}
    return RunConfig.model_validate(
        {**models, "data": {"seq_len": 64}, "train": {"micro_batch_size": 2, "parallel": parallel}}
    )


def lines(estimated: Estimate) -> dict[str, float]:
    return {line.name: line.num_bytes for line in estimated.memory.lasting}


def product_flops(estimated: Estimate, part: str) -> float:
    work = estimated.setup.student.work
    assert work is not None
    return sum(op.flops * count for op, count in getattr(work, part).items() if op.kind == "product")


def product_seconds(estimated: Estimate, phase: str) -> float:
    assert estimated.time is not None
    return next(each.products for each in estimated.time.phases if each.name == phase)


LORAS: dict[str, dict[str, Any]] = {
    "all": {"r": 4},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", LORAS)
def test_what_is_trained_is_what_the_student_trains(folder: Path, name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "student")).save_pretrained(tmp_path)
    config = config_of(folder, LORAS[name])
    source = config.student.model_copy(update={"model": str(tmp_path)})
    student = build_student(source, make_model("llama"), seed=0)
    found = estimate(config, world_size=1).setup.student
    assert found.numel == sum(p.numel() for p in student.parameters())
    assert found.trainable == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found.head_trainable == (name == "whole")


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_gradients_and_moments_are_those_of_adapters(folder: Path, world_size: int) -> None:
    found = estimate(config_of(folder, {"r": 4}), world_size=world_size)
    cut = [w for unit in found.setup.student.units for w in unit.weights if w.trainable]
    held = sum(-(-weight.rows // world_size) * weight.columns for weight in cut)
    assert lines(found)["student gradients"] == 4 * held
    assert lines(found)["AdamW"] == 8 * held
    assert "head's gradient reduced" not in found.memory.phases
    whole = estimate(config_of(folder, None), world_size=world_size)
    assert lines(found)["student parameters"] > lines(whole)["student parameters"], "the base stays, in fp32"
    assert found.memory.phase_bytes("layers' backward") < whole.memory.phase_bytes("layers' backward")


@pytest.mark.parametrize(("parallel", "narrow"), [("fsdp", True), ("ddp", True), ("fsdp1", False)])
def test_the_base_is_held_in_the_precision_of_the_student(folder: Path, parallel: str, narrow: bool) -> None:
    config = config_of(folder, {"r": 4}, parallel=parallel, dtype="bfloat16")
    found = estimate(config, world_size=2)
    weights = [w for unit in found.setup.student.units for w in unit.weights]
    ranks = {"ddp": 1}.get(parallel, 2)
    held = {True: 0, False: 0}
    for weight in weights:
        cut = -(-weight.numel // ranks) if parallel == "fsdp1" else -(-weight.rows // ranks) * weight.columns
        held[weight.trainable] += cut
    assert lines(found)["student parameters"] == 4 * held[True] + (2 if narrow else 4) * held[False]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_masters_of_adapters_alone(folder: Path, stage: int) -> None:
    config = config_of(folder, {"r": 4}, parallel="deepspeed", dtype="bfloat16")
    config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage}}})
    found = estimate(config, world_size=8)
    part = -(-found.setup.student.trainable // 8)
    assert lines(found)["fp32 masters"] == 4 * part and lines(found)["AdamW"] == 8 * part


def test_fsdp1_keeps_a_gradient_of_each_unit_that_has_an_adapter(folder: Path) -> None:
    found = estimate(config_of(folder, {"r": 4}, parallel="fsdp1"), world_size=2)
    layers = [unit for unit in found.setup.student.units if unit.name == "layer"]
    reduced = sum(-(-weight.numel // 2) for unit in layers for weight in unit.weights)
    assert lines(found)["student gradients"] == 4 * reduced > lines(found)["AdamW"] / 2


def test_no_gradient_of_a_frozen_weight_is_computed(folder: Path) -> None:
    """A backward pass has as many products as the forward one, and not twice as many, and keeps less for them."""
    found, whole = (estimate(config_of(folder, lora), world_size=1) for lora in ({"r": 1}, None))
    ahead = product_flops(whole, "forward")
    assert product_flops(whole, "backward") == pytest.approx(2 * ahead, rel=0.1)
    assert product_flops(found, "backward") < 1.3 * ahead
    assert product_seconds(found, "student backward") < 0.7 * product_seconds(whole, "student backward")


def test_fewer_layers_with_adapters_keep_less(folder: Path) -> None:
    kept = {}
    for name, lora in (("few", {"r": 1, "target_modules": ["q_proj"]}), ("all", {"r": 1})):
        activations = estimate(config_of(folder, lora), world_size=1).setup.student.activations
        assert activations is not None
        kept[name] = sum(activations.layers)
    assert kept["few"] < kept["all"]


@pytest.mark.parametrize(("targets", "kept"), [(["q_proj"], True), (["q_proj", "lm_head"], False)])
def test_a_head_below_an_adapter_is_gathered_in_each_micro_batch(folder: Path, targets: list[str], kept: bool) -> None:
    config = config_of(folder, {"target_modules": targets})
    config = config.model_copy(update={"train": config.train.model_copy(update={"gradient_accumulation_steps": 4})})
    assert keeps_student_head(estimate(config, world_size=2).setup) == kept


def test_the_table_says_how_much_is_trained(folder: Path) -> None:
    found = estimate(config_of(folder, {"r": 4}), world_size=1)
    (row,) = [row for row in tables_of(found)[0].rows if row[0] == "student"]
    assert f"{found.setup.student.trainable / 1e6:,.1f}M trained" in row[-1]
    assert not torch.empty(1).is_meta, "nothing else is made there"
