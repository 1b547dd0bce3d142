"""The README's code and commands, run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_plugin.settings.yaml_file import load_config
from kd_plugin.training.tensorboard import TAGS
from tests.tiny_models import make_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def tiny_model(*_: Any) -> torch.nn.Module:
    return make_model("llama", width=16, vocab_size=32, dtype=torch.float32).train()


@pytest.fixture
def names() -> dict[str, Any]:
    """What the blocks take for granted."""
    import transformers

    import kd_plugin as kd

    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 8))
    return {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=tiny_model),
        "loader": [{"input_ids": ids, "labels": ids}],
        "kd": kd,
        "transformers": transformers,
        "trl": SimpleNamespace(SFTTrainer=transformers.Trainer),  # the real one: tests/hf/test_sft.py
        "config": kd.DistillConfig(row_kernel="eager"),
        "student_hidden": torch.randn(2, 8, 16, requires_grad=True),
        "student_weight": torch.randn(32, 16, requires_grad=True),
        "teacher_hidden": torch.randn(2, 8, 24),
        "teacher_weight": torch.randn(32, 24),
        "targets": ids,
    }


@pytest.fixture
def for_a_trainer(tmp_path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer's block takes for granted besides."""
    from tests.hf_runs import arguments

    names |= {"student": tiny_model(), "teacher": tiny_model(), "args": arguments(tmp_path, max_steps=1)}
    return names | {"rows": [{"input_ids": row, "labels": row} for row in names["targets"].repeat(4, 1)]}


IDS = ["before", "after", "tensors", "trainer", "trl", "registered"]


@pytest.mark.parametrize("block", CODE, ids=IDS)
def test_code_blocks_run(block: str, request: pytest.FixtureRequest) -> None:
    names = request.getfixturevalue("for_a_trainer" if "DistillTrainer(" in block else "names")
    exec(compile(block, "README.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.log_history[0]["soft_loss"] >= 0
    elif "student" in names:
        gradients = [parameter.grad for parameter in names["student"].parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    elif "DistillSFTTrainer" in block:
        assert names["DistillSFTTrainer"].__mro__[1].__name__ == "DistillTrainerMixin"
    elif "register_divergence" in block:
        assert names["config"].divergence == "hellinger"
    else:
        assert names["student_weight"].grad.abs().sum() > 0


def test_commands_name_files_that_exist_and_overrides_that_are_accepted(repo_root: Path) -> None:
    lines = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("    ")]
    configs = [words for words in lines if any(word.endswith(".yaml") for word in words)]
    assert len(configs) == 4
    for words in configs:
        at = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
        options = next((index for index, word in enumerate(words) if word.startswith("--") and index > at), None)
        load_config(repo_root / words[at], words[at + 1 : options])
    scripts = [word for words in lines for word in words if re.fullmatch(r"launch/\w+\.(py|sh)", word)]
    assert len(scripts) == 4
    assert all((repo_root / script).is_file() for script in scripts)


def test_the_table_of_tags_is_complete() -> None:
    listed = set(re.findall(r"`((?:train|distill)/\w+)`", README))
    written = {tag for tag in TAGS.values() if tag.startswith(("train/", "distill/"))}
    assert written - listed <= {"distill/valid_tokens"}
    assert listed <= written


def test_the_package_s_page_names_files_that_exist() -> None:
    folder = Path(__file__).parents[1] / "kd_plugin"
    page = (folder / "README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w/.]+)`", page) if "/" in name}
    assert len(named) > 30
    assert [
        name for name in sorted(named) if not (folder / name).exists() and not (folder.parent / name).exists()
    ] == []
