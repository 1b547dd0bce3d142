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


@pytest.mark.parametrize("other", KEYS)
def test_what_other_trainers_call_a_setting_leads_to_it(config_file: Path, other: str) -> None:
    section, _, key = KEYS[other].partition(".")
    assert key in known_keys((section,)) and other not in known_keys((section,))
    home = next(name for name in ("data", "log") if name != section and other not in known_keys((name,)))
    (line,) = faults(config_file, f"{home}.{other}=1")
    assert f"unknown key; did you mean '{KEYS[other]}'?" in line
    (line,) = faults(config_file, f"{section}.{other}=1")
    assert f"unknown key; did you mean '{key}'?" in line


@pytest.mark.parametrize("other", DIVERGENCES)
def test_what_other_trainers_call_a_divergence_leads_to_it(config_file: Path, other: str) -> None:
    assert DIVERGENCES[other] in BUILT_IN and other not in BUILT_IN
    (line,) = faults(config_file, f"distill.divergence={other}")
    assert f"did you mean '{DIVERGENCES[other]}'?" in line
