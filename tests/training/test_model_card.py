"""The model card of an export says where the student comes from and what it came to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import kd_plugin as kd
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.model_card import model_card
from tests.tiny_runs import make_folder, run_config

BEFORE = {"perplexity": 200.0, "kl_t1": 8.0, "top1_agreement": 0.01}
AFTER = {"perplexity": 20.0, "kl_t1": 2.0, "top1_agreement": 0.35}


def parts_of(card: str) -> tuple[dict[str, object], str]:
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_export_has_a_card_with_the_run_s_own_numbers_and_settings(tmp_path: Path) -> None:
    make_folder(tmp_path)
    result = kd.train(run_config(tmp_path, train={"max_steps": 2}))
    assert result.export_dir is not None
    metadata, text = parts_of((result.export_dir / "README.md").read_text(encoding="utf-8"))
    assert metadata["library_name"] == "transformers" and "base_model" not in metadata, "a folder is no hub id"
    assert f"`{tmp_path / 'teacher'}`" in text and "2 layers of the teacher" in text and "Steps: 2 of 2" in text
    before, after = result.before["perplexity"], result.after["perplexity"]
    assert f"| held-out perplexity | {before:.2f} | {after:.2f} |" in text
    (settings,) = [part.removeprefix("yaml\n") for part in text.split("```") if part.startswith("yaml\n")]
    assert settings == (result.output_dir / "config.yaml").read_text()
    assert "- torch " in text and "- transformers " in text


@pytest.mark.parametrize(
    ("student", "base", "said"),
    [
        ({"model": "owner/small", "revision": "v2"}, "owner/small", "Student: `owner/small` (v2)"),
        ({"from_teacher": {"layers": 4}}, "owner/large", "Student: 4 layers of the teacher"),
        ({"from_config": {"hidden_size": 8}}, "owner/large", "in the shape of `owner/large` with `{'hidden_size': 8}`"),
    ],
)
def test_models_of_the_hub_are_named_as_base_models(student: dict[str, object], base: str, said: str) -> None:
    config = RunConfig.model_validate({"teacher": {"model": "owner/large"}, "student": student})
    metadata, text = parts_of(model_card(config, BEFORE, AFTER, step=7))
    assert metadata["base_model"] == base and said in text
    assert "| KL(teacher||student), nats |" not in text, "a bar would end the cell"
    assert "| top-1 agreement | 1.0% | 35.0% | +34.0 pp |" in text
