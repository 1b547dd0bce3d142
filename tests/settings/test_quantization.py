"""Ways to quantise a teacher: what is taken, what is refused, and what other trainers' names lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_plugin.settings.aliases import VALUES
from kd_plugin.settings.quantization import bits_of, method_of
from kd_plugin.settings.run import RunConfig, TeacherConfig
from kd_plugin.settings.schema import field_schema, wanted
from kd_plugin.settings.yaml_file import ConfigError, load_config, to_yaml
from tests.minimal_config import MINIMAL
from tests.refusals import refused

BY_TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}


@pytest.mark.parametrize(
    ("quantization", "method", "bits"),
    [
        ("int8", "torchao", 8),
        ("int4", "torchao", 4),
        ("bitsandbytes_8bit", "bitsandbytes", 8),
        ("bitsandbytes_4bit", "bitsandbytes", 4),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes", 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", 8),
        (BY_TORCHAO, "torchao", 8),
        ({**BY_TORCHAO, "quant_type": {"default": {"_type": "SomethingElseConfig"}}}, "torchao", None),
    ],
)
def test_names_and_mappings_say_who_quantises_and_to_how_many_bits(
    quantization: str | dict[str, Any], method: str, bits: int | None
) -> None:
    taken = TeacherConfig(model="x", quantization=quantization).quantization
    assert taken == quantization
    assert (method_of(taken), bits_of(taken)) == (method, bits)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int3", ("'int8', 'int4', 'bitsandbytes_8bit' or 'bitsandbytes_4bit'", "got 'int3'")),
        ({}, ("quant_method is None, wanted torchao or bitsandbytes", "needs no setting")),
        ({"quant_method": "gptq", "bits": 4}, ("quant_method is 'gptq', wanted torchao or bitsandbytes",)),
        ({"quant_method": "bitsandbytes"}, ("one of load_in_8bit and load_in_4bit",)),
        ({"load_in_8bit": True, "load_in_4bit": True}, ("one of load_in_8bit and load_in_4bit",)),
        ({"quant_method": "torchao"}, ("quant_type is None, wanted what torchao writes", "int8 and int4 are short")),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, ("quant_type is 'int8_weight_only'",)),
        ({**BY_TORCHAO, "include_input_output_embeddings": True}, ("multiplies by the head as it is",)),
        ({**BY_TORCHAO, "untie_embedding_weights": True}, ("untie_embedding_weights is true", "leave the key out")),
    ],
)
def test_what_would_not_leave_a_plain_head_is_refused(quantization: Any, words: tuple[str, ...]) -> None:
    refused(lambda: TeacherConfig(model="x", quantization=quantization), "quantization: ", *words)


def with_teacher(path: Path, line: str) -> Path:
    path.write_text(MINIMAL + f"  {line}\n", encoding="utf-8")
    return path


def test_a_fault_in_a_file_has_its_line(tmp_path: Path) -> None:
    path = with_teacher(tmp_path / "c.yaml", "quantization: {quant_method: gptq}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:5: teacher.quantization: quant_method is 'gptq'")


@pytest.mark.parametrize("quantization", ["int8", BY_TORCHAO])
def test_a_saved_configuration_reads_back(tmp_path: Path, quantization: str | dict[str, Any]) -> None:
    values = {"student": {"from_teacher": {"layers": 2}}, "teacher": {"model": "x", "quantization": quantization}}
    config = RunConfig.model_validate(values)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("train.optimizer=adamw_bnb_8bit", "adamw_8bit"),
        ("train.optimizer=paged_adamw_8bit", "adamw_8bit"),
        ("teacher.quantization=4bit", "bitsandbytes_4bit"),
        ("teacher.quantization=int8_weight_only", "int8"),
        ("teacher.load_in_8bit=true", "quantization"),
        ("load_in_4bit=true", "teacher.quantization"),
    ],
)
def test_what_other_trainers_write_is_answered(config_file: Path, override: str, suggested: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, override)
    (line,) = str(caught.value).splitlines()
    assert f"did you mean '{suggested}'?" in line


def test_every_value_that_is_suggested_is_taken() -> None:
    for key, others in VALUES.items():
        words = wanted(field_schema(tuple(key.split(".")))[1])
        for other, value in others.items():
            assert f"'{value}'" in words and f"'{other}'" not in words, (key, other)
