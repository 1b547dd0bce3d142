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
    known = {section: known_keys((section,)) for section in ("student", "teacher", "distill", "data", "train", "log")}
    for other, setting in KEYS.items():
        section, _, key = setting.partition(".")
        assert key in known[section] and other not in known[section], other
    assert set(DIVERGENCES.values()) <= set(BUILT_IN) and not set(DIVERGENCES) & set(BUILT_IN)


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("train.lr=3", "learning_rate"),
        ("lr=3", "train.learning_rate"),
        ("train.batch_size=3", "micro_batch_size"),
        ("log.wandb=true", "report_to"),
        ("distill.divergence=kl", "forward_kl"),
    ],
)
def test_it_is_suggested(config_file: Path, override: str, suggested: str) -> None:
    (line,) = faults(config_file, override)
    assert f"did you mean '{suggested}'?" in line
