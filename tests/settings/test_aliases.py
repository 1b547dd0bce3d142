"""What other trainers call a setting or a divergence leads to the name here."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_plugin.settings.aliases import DIVERGENCES, KEYS
from kd_plugin.settings.distill import BUILT_IN
from kd_plugin.settings.schema import known_keys
from kd_plugin.settings.yaml_file import ConfigError, load_config


def faults(path: Path, override: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, override)
    return str(caught.value).splitlines()


def test_every_other_name_leads_to_a_setting_that_there_is() -> None:
    for other, setting in KEYS.items():
        *section, key = setting.split(".")
        assert key in known_keys(tuple(section)) and other not in known_keys(tuple(section[:1])), other
    assert set(DIVERGENCES.values()) <= set(BUILT_IN) and not set(DIVERGENCES) & set(BUILT_IN)


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("train.lr=3", "learning_rate"),
        ("lr=3", "train.learning_rate"),
        ("train.batch_size=3", "micro_batch_size"),
        ("log.wandb=true", "report_to"),
        ("distill.divergence=kl", "forward_kl"),
        ("student.lora_r=3", "student.lora.r"),
        ("train.lora_alpha=3", "student.lora.lora_alpha"),
        ("lora.r=3", "student.lora"),
        ("student.use_peft=true", "lora"),
        ("student.lora.lora_r=3", "r"),
        ("student.lora.alpha=3", "lora_alpha"),
        ("student.lora.dropout=0.1", "lora_dropout"),
    ],
)
def test_it_is_suggested(config_file: Path, override: str, suggested: str) -> None:
    (line,) = faults(config_file, override)
    assert f"did you mean '{suggested}'?" in line
