"""The package as others get it: wheel, imports, names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import kd_plugin as kd


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:  # type: ignore[type-arg]
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_packaged(repo_root: Path, project: dict) -> None:  # type: ignore[type-arg]
    folders = {path.parent for path in (repo_root / "kd_plugin").rglob("*.py")}
    names = {".".join(folder.relative_to(repo_root).parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == names | {"kd_plugin.recipes"}


def test_every_direct_dependency_has_a_tested_version(repo_root: Path, project: dict) -> None:  # type: ignore[type-arg]
    lines = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {line.partition("==")[0] for line in lines if "==" in line}
    extras = project["project"]["optional-dependencies"].values()
    direct = [*project["project"]["dependencies"], *(name for extra in extras for name in extra)]
    assert {re.match(r"[\w-]+", name)[0] for name in direct} <= tested  # type: ignore[index]


def test_a_wheel_brings_recipes_and_types_along(repo_root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, as setuptools leaves build/ behind
    source.mkdir()
    for name in ("kd_plugin", "configs"):
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    python("-c", "import setuptools.build_meta as b; b.build_wheel('..')", cwd=source)

    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert {path.name for path in installed.iterdir()} == {
        "kd_plugin",
        f"kd_plugin-{kd.__version__}.dist-info",
    }
    assert all((installed / "kd_plugin" / name).is_file() for name in ("py.typed", "__init__.pyi"))
    code = "import kd_plugin, kd_plugin.cli.commands as c; print(kd_plugin.__file__); print(*c.recipes())"
    where, recipes = python("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(where).is_relative_to(installed)
    assert recipes.split() == sorted(path.stem for path in (repo_root / "configs").glob("*.yaml"))


def test_importing_the_package_imports_nothing_else(tmp_path: Path, repo_root: Path) -> None:
    code = "import sys, kd_plugin; print([m for m in sys.modules if m.startswith(('torch', 'kd_plugin.'))])"
    assert python("-c", code, cwd=tmp_path, PYTHONPATH=str(repo_root)).strip() == "[]"


PUBLIC = ("CollectiveError", "ConfigError", "DistillConfig", "DistillHead", "DistillOutput", "HeadTeacher", "Plugin")
PUBLIC += ("RunConfig", "ShardedLogits", "attach", "distill_logits", "distill_loss", "distill_loss_per_token")
PUBLIC += ("load_config", "reference", "register_divergence", "train", "__version__")


def test_no_public_name_is_lost_or_added_by_chance() -> None:
    assert tuple(kd.__all__) == PUBLIC


@pytest.mark.parametrize("name", kd.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert name in dir(kd) or name == "__version__"
    assert callable(getattr(kd, name)) or name in ("reference", "__version__")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="kd_plugin attribute nope"):
        _ = kd.nope


@pytest.mark.parametrize("script", ["launch/setup_venv.sh", "launch/quickstart.sh", "launch/test.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(repo_root: Path, script: str) -> None:
    assert os.access(repo_root / script, os.X_OK)
    subprocess.run(["bash", "-n", repo_root / script], check=True, timeout=10)
