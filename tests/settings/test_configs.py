"""The recipes in configs/ and what is generated beside them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from kd_plugin.cli.commands import recipes
from kd_plugin.settings.schema import json_schema, markdown
from kd_plugin.settings.yaml_file import load_config, to_yaml

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(resolved) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_schema_and_its_launch_command(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    (command,) = (shlex.split(line.lstrip("# ")) for line in rest if line.startswith("#") and "launch/" in line)
    assert command[0] in ("torchrun", "deepspeed")
    script, config = command[-2:]
    assert (FOLDER.parent / script).is_file()
    assert FOLDER.parent / config == path
    assert ("deepspeed" in script) == (load_config(path).train.parallel == "deepspeed")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_writes_to_a_folder_of_its_own_name(path: Path) -> None:
    assert load_config(path).log.output_dir == f"runs/{path.stem}"


def test_the_two_quickstart_recipes_differ_in_how_they_are_trained_only() -> None:
    fsdp, zero = (load_config(FOLDER / f"smollm2_135m_to_8l_{how}.yaml") for how in ("fsdp2", "zero3"))
    assert zero.deepspeed is not None
    same = zero.model_copy(
        update={
            "deepspeed": None,
            "log": zero.log.model_copy(update={"output_dir": fsdp.log.output_dir}),
            "train": zero.train.model_copy(update={"parallel": "auto"}),
        }
    )
    assert same == fsdp


def test_the_configuration_reference_is_current() -> None:
    written = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert written == markdown(recipes()) + "\n", "run: kd-plugin schema --markdown > configs/README.md"


def test_the_schema_is_current() -> None:
    written = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "run: kd-plugin schema > configs/schema.json"
