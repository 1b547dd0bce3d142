"""Teachers that are quantised while they are loaded: what is packed, what stays, and what cannot be one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_plugin.distributed.torch_internals import inner_tensors, is_wrapper_subclass
from kd_plugin.models.files import ModelError
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.models.students import StudentError
from kd_plugin.settings.run import StudentConfig, TeacherConfig
from tests.refusals import refused
from tests.tiny_models import make_batch, make_model

pytest.importorskip("torchao")


def saved(folder: Path, name: str = "llama", **settings: object) -> str:
    make_model(name, dtype=torch.float32, **settings).save_pretrained(folder)
    return str(folder)


def quantised(folder: Path, name: str = "llama", *, quantization: str = "int8", dtype: str = "float32", **more: object):
    return load_teacher(TeacherConfig(model=saved(folder, name, **more), dtype=dtype, quantization=quantization))


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if is_wrapper_subclass(parameter)}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_tied", "phi"])
def test_all_linear_layers_but_the_head_are_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    with caplog.at_level(logging.INFO):
        teacher = quantised(tmp_path, name)
    linear = {f"{key}.weight" for key, module in teacher.named_modules() if isinstance(module, nn.Linear)}
    assert packed_names(teacher) == linear - {"lm_head.weight"} != set()
    embedding, head = teacher.get_input_embeddings().weight, teacher.lm_head.weight
    assert (embedding is head) == name.endswith("tied")
    assert type(head) is nn.Parameter and head.dtype == torch.float32
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert f"int8, {len(linear) - 1} of {len(linear) - 1} linear layers" in caplog.text


def test_int8_is_near_the_weights_and_takes_a_byte_for_each(tmp_path: Path) -> None:
    teacher = quantised(tmp_path)
    whole = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32"))
    for name in packed_names(teacher):
        weight, plain = teacher.get_parameter(name), whole.get_parameter(name)
        assert (weight.dequantize() - plain).abs().max() <= plain.abs().max() / 127
        assert (
            sum(part.nbytes for part in inner_tensors(weight)) == plain.numel() + (4 + 1) * plain.shape[0]
        )  # scale, zero
    ids = make_batch()["input_ids"]
    off = (teacher(ids).logits - whole(ids).logits).norm() / whole(ids).logits.norm()
    assert 1e-4 < off < 0.05


def test_quantising_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    from torch._inductor import config

    before = torch.get_float32_matmul_precision(), config.coordinate_descent_tuning, config.epilogue_fusion
    quantised(tmp_path)
    assert before == (torch.get_float32_matmul_precision(), config.coordinate_descent_tuning, config.epilogue_fusion)


def test_four_bits_run_on_a_cpu(tmp_path: Path) -> None:
    teacher = quantised(tmp_path, quantization="int4", width=128)
    whole = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32"))
    assert "model.layers.0.mlp.down_proj.weight" in packed_names(teacher)
    ids = make_batch()["input_ids"]
    off = (teacher(ids).logits - whole(ids).logits).norm() / whole(ids).logits.norm()
    assert 1e-3 < off < 0.5
    size = sum(part.nbytes for part in inner_tensors(teacher.get_parameter("model.layers.0.mlp.down_proj.weight")))
    assert size < 128 * 256


def test_a_mapping_of_a_config_json_does_what_its_short_name_does(tmp_path: Path) -> None:
    short = quantised(tmp_path)
    mapping = short.config.quantization_config.to_dict()
    long = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32", quantization=mapping))
    ids = make_batch()["input_ids"]
    assert packed_names(long) == packed_names(short)
    assert torch.equal(long(ids).logits, short(ids).logits)


def test_modules_that_a_mapping_leaves_out_stay_plain(tmp_path: Path) -> None:
    mapping = quantised(tmp_path).config.quantization_config.to_dict()
    mapping["modules_to_not_convert"] = ["lm_head", "model.layers.*.down_proj"]
    teacher = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32", quantization=mapping))
    names = packed_names(teacher)
    assert names and not any("down_proj" in name or "lm_head" in name for name in names)


def test_a_mapping_that_torchao_cannot_read_is_named(tmp_path: Path) -> None:
    block = {"quant_method": "torchao", "quant_type": {"default": {"_type": "NoSuchConfig", "_data": {}}}}
    config = TeacherConfig(model=saved(tmp_path), quantization=block)
    refused(lambda: load_teacher(config), "teacher.quantization: ", "NoSuchConfig", "cannot be read")


def test_a_model_without_linear_layers_is_not_said_to_be_quantised(tmp_path: Path) -> None:
    words = ("teacher.quantization int8 quantises nothing in GPT2LMHeadModel", "leave it out")
    refused(lambda: quantised(tmp_path, "gpt2"), *words)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder whose weights are quantised."""
    teacher = quantised(tmp_path / "whole")
    teacher.save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


def test_a_quantised_checkpoint_is_a_teacher_and_no_student(checkpoint: str, tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(model=checkpoint, dtype="float32"))
    again = load_teacher(TeacherConfig(model=str(tmp_path / "whole"), dtype="float32", quantization="int8"))
    ids = make_batch()["input_ids"]
    assert packed_names(teacher) == packed_names(again)
    assert torch.equal(teacher(ids).logits, again(ids).logits)
    with pytest.raises(ModelError, match=r"student\.model: its weights are quantised \(torchao\)"):
        build_student(StudentConfig(model=checkpoint), teacher, seed=0)
    with pytest.raises(StudentError, match=r"weights of teacher\.model are quantised \(torchao\)"):
        build_student(StudentConfig.model_validate({"from_teacher": {"layers": 2}}), teacher, seed=0)
    fresh = build_student(StudentConfig.model_validate({"from_config": {"num_hidden_layers": 1}}), teacher, seed=0)
    assert not packed_names(fresh) and not hasattr(fresh.config, "quantization_config")
