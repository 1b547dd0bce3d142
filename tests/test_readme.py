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


def tiny_model(*_: Any, seed: int = 0) -> torch.nn.Module:
    return make_model("llama", seed=seed, width=16, vocab_size=32, dtype=torch.float32).train()


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
    import accelerate

    from kd_plugin.hf import place_teacher
    from tests.hf_runs import arguments

    names |= {"student": tiny_model(), "teacher": tiny_model(seed=1), "args": arguments(tmp_path, max_steps=1)}
    rows = [{"input_ids": row, "labels": row} for row in names["targets"].repeat(4, 1)]
    names |= {"rows": rows, "chats": rows, "Trainer": names["transformers"].Trainer}
    names |= {"Accelerator": accelerate.Accelerator, "place_teacher": place_teacher, "data": names["loader"]}
    names |= {"optimizer": torch.optim.SGD(names["student"].parameters())}
    return names | {"lightning": SimpleNamespace(LightningModule=torch.nn.Module)}  # the real one: test_examples.py


IDS = ["before", "after", "tensors", "registered"]


@pytest.mark.parametrize("block", CODE, ids=IDS)
def test_code_blocks_run(block: str, request: pytest.FixtureRequest) -> None:
    names = request.getfixturevalue("names")
    exec(compile(block, "README.md", "exec"), names)
    if "student" in names:
        gradients = [parameter.grad for parameter in names["student"].parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    elif "register_divergence" in block:
        assert names["config"].divergence == "hellinger"
    else:
        assert names["student_weight"].grad.abs().sum() > 0


DIFFS = dict(
    zip(
        ("Trainer", "SFTTrainer", "on-policy", "accelerate", "Lightning"),
        re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL),
        strict=True,
    )
)


def side(diff: str, added: str) -> str:
    """What a file has before (`-`) or after (`+`) a change."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[0] in (added, " "))


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer", "accelerate", "Lightning"])
def test_what_a_trainer_s_script_becomes_distils(name: str, for_a_trainer: dict[str, Any]) -> None:
    names = for_a_trainer
    exec(compile(side(DIFFS[name], "-"), "README.md", "exec"), dict(names))
    exec(compile(side(DIFFS[name], "+"), "README.md", "exec"), names)
    batch = {"input_ids": names["targets"], "labels": names["targets"]}
    if "trainer" in names:
        names["trainer"].train()
        assert names["trainer"].state.log_history[0]["soft_loss"] >= 0
    elif name == "accelerate":
        names["model"](**batch).loss.backward()
        assert names["plugin"].metrics()["soft_loss"] > 0
    else:
        module = names["Finetuned"](names["student"], names["teacher"])
        module.log_dict = names.update
        module.training_step(batch, 0).backward()
        module.on_train_batch_end()
        assert names["soft_loss"] > 0


def test_the_on_policy_change_reads_as_python_and_names_what_there_is() -> None:
    """It runs in tests/test_examples.py; here its names."""
    import kd_plugin.hf

    for added in "-+":
        compile(side(DIFFS["on-policy"], added), "README.md", "exec")
    assert kd_plugin.hf.DistillOnPolicyMixin.__name__ in DIFFS["on-policy"]


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
