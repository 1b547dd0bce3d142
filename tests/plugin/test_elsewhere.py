"""Weights that are whole only inside their module's own forward: accelerate's offloading, the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.tiny_models import assert_same_gradients, expected_loss, gradients_of, make_batch, make_model

CPU = torch.device("cpu")


def head_only(model: nn.Module) -> nn.Module:
    add_hook_to_module(model.get_output_embeddings(), AlignDevicesHook(CPU, offload=True))
    return model


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, str(folder), execution_device=CPU)
    return model


def by_whole_models(model: nn.Module) -> nn.Module:
    hook = AlignDevicesHook(CPU, offload=True, place_submodules=True)
    add_hook_to_module(model, hook)
    return model


OFFLOADED: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": on_disk,
    "the whole model at once": lambda model, folder: by_whole_models(model),
    "its head only": lambda model, folder: head_only(model),
}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite", "phi", "bart"])
@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_teacher_gives_the_same_loss_as_a_whole_one(way: str, name: str, tmp_path: Path) -> None:
    if way in ("its head only", "the whole model at once") and name in ("llama_tied", "gemma2", "bart"):
        pytest.skip("accelerate offloads tied weights by itself only where it goes through the model")
    student, teacher, batch = make_model(name, seed=1), make_model(name, seed=2), make_batch()
    config = config_of("jsd", chunk_size=5)
    expected = expected_loss(student, teacher, batch, config).loss.item()
    wanted = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    teacher = OFFLOADED[way](teacher, tmp_path)
    assert any(parameter.is_meta for parameter in teacher.parameters())
    before = teacher(**batch).logits
    plugin = kd.attach(student, teacher, config)
    for _ in range(2):
        assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), wanted, 1e-8)
    assert any(parameter.is_meta for parameter in teacher.parameters())  # taken away again
    assert torch.equal(teacher(**batch).logits, before)
    plugin.detach()
    assert torch.equal(teacher(**batch).logits, before)


def test_an_offloaded_student_is_refused() -> None:
    student = cpu_offload(make_model("llama"), execution_device=CPU)
    with pytest.raises(ValueError, match=r"forward of lm_head has been replaced.*remove_hook_from_module"):
        kd.attach(student, make_model("llama"), config_of())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_still_on_meta_is_refused_when_it_is_needed(side: str) -> None:
    """A buffer that nobody has written must not become a loss."""
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    kd.attach(models["student"], models["teacher"], config_of())
    models[side].lm_head.weight = nn.Parameter(models[side].lm_head.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="meta"):
        models["student"](**make_batch())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_that_wait_for_an_engine_are_refused_by_name(side: str) -> None:
    """zero.Init leaves an empty parameter with its shape beside it."""
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    for number, parameter in enumerate(models[side].parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = parameter.data.new_empty(0)
    kd.attach(models["student"], models["teacher"], config_of())
    with pytest.raises(ValueError, match=rf"partitioned the {side}'s weights.*deepspeed.initialize"):
        models["student"](**make_batch())
