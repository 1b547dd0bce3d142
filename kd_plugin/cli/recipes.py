"""The recipes that come along, by name."""

from __future__ import annotations

import shutil
from pathlib import Path

from kd_plugin.settings.yaml_file import ConfigError

__all__ = ["config_path", "copy_recipe", "recipe", "recipes"]


def recipes() -> dict[str, str]:
    """Name of each recipe -> one line about it, from its first comment that is not for an editor."""
    about = {}
    for path in sorted(_recipe_dir().glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line.lstrip("# ") for line in lines if line.startswith("#"))
        about[path.stem] = next((text for text in comments if not text.startswith("yaml-language-server")), "")
    return about


def config_path(given: str | Path) -> Path:
    """The file that `given` names: itself, or the recipe of that name where there is no such file."""
    path = Path(given)
    is_name = path.name == str(given) and path.suffix in ("", ".yaml")
    return recipe(path.name) if is_name and not path.exists() and path.stem in recipes() else path


def recipe(name: str) -> Path:
    """The file of the recipe `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    stem = Path(name).stem if name.endswith(".yaml") else name
    if stem not in recipes():
        raise ConfigError(f"no recipe named {name}; there are: {', '.join(recipes())}")
    return _recipe_dir() / f"{stem}.yaml"


def copy_recipe(source: Path, destination: Path) -> Path:
    """Copy a recipe to a new file, or into a folder, with the schema that its first line names beside it.

    Raises:
        ConfigError: the file exists, or its folder does not.
    """
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target} exists; name another file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such directory; create it first")
    shutil.copyfile(source, target)
    schema_file = target.parent / "schema.json"  # the recipe's first line points its editor there
    if not schema_file.exists():
        shutil.copyfile(source.parent / "schema.json", schema_file)
    return target


def _recipe_dir() -> Path:
    """The folder with the recipes: kd_plugin/recipes in an installed wheel, configs/ in a checkout."""
    here = Path(__file__).parents[1]
    return next(folder for folder in (here / "recipes", here.parent / "configs") if folder.is_dir())
