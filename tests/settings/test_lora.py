"""`student.lora`: peft's names, their bounds, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

import kd_plugin as kd
from kd_plugin.settings.lora import LoraConfig
from kd_plugin.settings.run import StudentConfig
from kd_plugin.settings.yaml_file import ConfigError, load_config, to_yaml
from tests.refusals import refused


def test_peft_s_names_are_read_and_written_back(config_file: Path, tmp_path: Path) -> None:
    overrides = ["student.lora={r: 4, lora_alpha: 8, lora_dropout: 0.1}", "student.lora.target_modules=[q_proj]"]
    config = load_config(config_file, overrides)
    assert config.student.lora == LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=("q_proj",))
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config


def test_an_empty_mapping_takes_the_defaults_and_nothing_is_no_adapter(config_file: Path) -> None:
    assert load_config(config_file, "student.lora={}").student.lora == LoraConfig()
    assert LoraConfig().target_modules == "all-linear"
    assert load_config(config_file).student.lora is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.lora.r=0", "student.lora.r: wants a whole number > 0 (got 0)"),
        ('student.lora.target_modules="(["', "target_modules '([' is no regular expression"),
        ("student.lora.lora_dropout=1", "student.lora.lora_dropout: wants a number >= 0 and < 1 (got 1)"),
        ("student.lora.target_modules=[]", "student.lora.target_modules: wants non-empty text or a list of non-empty"),
        ("student.lora.modules_to_save=lm_head", "student.lora.modules_to_save: wants a list of non-empty texts"),
        ("student.lora=true", "student.lora: wants a mapping or null (got true)"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_key(config_file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, override)
    (line,) = str(caught.value).splitlines()
    assert said in line


def test_adapters_on_random_weights_are_refused_and_on_layers_of_the_teacher_are_not() -> None:
    refused(lambda: StudentConfig(from_config={"num_hidden_layers": 2}, lora=LoraConfig()), "at random", "from_teacher")
    assert StudentConfig(from_teacher={"layers": 2}, lora=LoraConfig()).lora is not None


def test_a_misspelt_key_in_python_is_compared_with_those_of_its_own_section() -> None:
    refused(lambda: StudentConfig(model="m", lora={"lora_alfa": 3}), "lora.lora_alfa", "did you mean 'lora_alpha'?")
    refused(lambda: kd.DistillConfig(terms=[{"nam": "tvd"}]), "terms.0.nam", "did you mean 'name'?")
