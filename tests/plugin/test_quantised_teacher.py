"""A student attached to a teacher of torchao's int8 weights: the loss is that of the quantised teacher's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.models.loading import load_teacher
from kd_plugin.settings.run import TeacherConfig
from tests.loss_cases import config_of
from tests.refusals import refused
from tests.tiny_models import assert_same_gradients, expected_loss, gradients_of, make_batch, make_model

pytest.importorskip("torchao")

BATCHES = [make_batch(seed, rows=3, length=11) for seed in range(3)]


def quantised(folder: Path, name: str = "llama", how: str = "int8", *, width: int = 48) -> nn.Module:
    make_model(name, seed=2, width=width, dtype=torch.float32).save_pretrained(folder)
    return load_teacher(TeacherConfig(model=str(folder), dtype="float32", quantization=how))


def student_of(name: str) -> nn.Module:
    return make_model(name, seed=1, dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gemma2", "phi"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_loss_is_that_of_the_quantised_teachers_logits(tmp_path: Path, name: str, divergence: str) -> None:
    student, teacher, config = student_of(name), quantised(tmp_path, name), config_of(divergence, temperature=1.7)
    batch = BATCHES[0]
    wanted = expected_loss(student, teacher, batch, config)
    gradients = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    plugin = kd.attach(student, teacher, config)
    assert student(**batch).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    metrics = plugin.metrics()
    assert metrics["soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
    assert metrics["kl_t1"] == pytest.approx(wanted.metrics["kl_t1"], rel=1e-5)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), gradients, 1e-5)


@pytest.mark.parametrize("how", ["int4", "bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_so_it_is_of_every_other_way_to_quantise(tmp_path: Path, how: str) -> None:
    if "bitsandbytes" in how:
        pytest.importorskip("bitsandbytes")
    student, teacher, config = student_of("llama"), quantised(tmp_path, how=how, width=128), config_of()
    wanted = expected_loss(student, teacher, BATCHES[0], config).loss.item()
    kd.attach(student, teacher, config)
    assert student(**BATCHES[0]).loss.item() == pytest.approx(wanted, rel=1e-5)


def test_it_is_another_loss_than_the_whole_teachers(tmp_path: Path) -> None:
    student, teacher, config = student_of("llama"), quantised(tmp_path), config_of()
    whole = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32"))
    packed, plain = (expected_loss(student, each, BATCHES[0], config).loss.item() for each in (teacher, whole))
    assert 1e-5 < abs(packed / plain - 1) < 0.05


def test_it_runs_ahead_over_several_micro_batches(tmp_path: Path) -> None:
    student, teacher, config = student_of("llama"), quantised(tmp_path), config_of()
    plugin = kd.attach(student, teacher, config)
    one_by_one = [student(**batch).loss.item() for batch in BATCHES]
    plugin.teacher_ahead(BATCHES)
    assert [student(**batch).loss.item() for batch in BATCHES] == one_by_one


def test_it_is_as_it_was_after_detaching(tmp_path: Path) -> None:
    student, teacher = student_of("llama"), quantised(tmp_path)
    ids = BATCHES[0]["input_ids"]
    before = teacher(ids).logits
    plugin = kd.attach(student, teacher, config_of())
    student(**BATCHES[0]).loss.backward()
    plugin.detach()
    assert torch.equal(teacher(ids).logits, before)


def test_a_head_that_torchao_has_packed_is_refused(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    teacher = quantised(tmp_path)
    quantize_(teacher.lm_head, Int8WeightOnlyConfig(version=2))
    words = ("the teacher's head is a torch.nn.modules.linear.Linear with torchao", "out of quantisation")
    refused(lambda: kd.attach(student_of("llama"), teacher, config_of()), *words)


def test_a_student_of_packed_layers_trains_only_what_is_not_packed(tmp_path: Path) -> None:
    """As with adapters on a quantised base: packed weights are frozen, and the loss reaches all others."""
    student, teacher = quantised(tmp_path), make_model("llama", seed=3, dtype=torch.float32)
    trained: list[Tensor] = [student.model.norm.weight, student.lm_head.weight, student.model.embed_tokens.weight]
    for parameter in trained:
        parameter.requires_grad_(True)
    kd.attach(student, teacher, config_of())
    student(**BATCHES[0]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
