"""The project keeps its rules: imports point down, files and functions are short, helpers lie outside of tests."""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE, MAX_FUNCTION, MAX_CLASS = 300, 45, 160  # lines
MEDIAN, NINE_TENTHS = 8, 20  # of functions
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lines_of(repo_root: Path, *kinds: type[ast.AST]) -> dict[str, int]:
    """Lines of every definition of these kinds in the package, by path and name."""
    return {
        f"{path.relative_to(repo_root)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in (repo_root / "kd_plugin").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kinds)
    }


def above(limit: int, lines: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in lines.items() if count > limit}


@pytest.mark.parametrize("folder", ["kd_plugin", "tests"])
def test_no_file_is_long(repo_root: Path, folder: str) -> None:
    paths = (repo_root / folder).rglob("*.py")
    counts = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(counts) > 50
    assert above(MAX_FILE, counts) == {}


def test_functions_are_short(repo_root: Path) -> None:
    functions = lines_of(repo_root, ast.FunctionDef, ast.AsyncFunctionDef)
    assert above(MAX_FUNCTION, functions) == {}


def test_most_functions_are_a_few_lines(repo_root: Path) -> None:
    functions = lines_of(repo_root, ast.FunctionDef, ast.AsyncFunctionDef)
    assert statistics.median(functions.values()) <= MEDIAN
    assert sorted(functions.values())[int(0.9 * len(functions))] <= NINE_TENTHS


def test_no_class_is_long(repo_root: Path) -> None:
    assert above(MAX_CLASS, lines_of(repo_root, ast.ClassDef)) == {}


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of `from tests.x import y`: both tests.x and tests.x.y."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_helper_is_imported_from_a_test_file(repo_root: Path) -> None:
    found = [
        f"{path.relative_to(repo_root)} imports {module}"
        for folder in ("tests", "benchmarks")
        for path in (repo_root / folder).rglob("*.py")
        for module in imported_modules(path)
        if re.search(r"^tests\.(\w+\.)*(test_\w+|conftest)(\.|$)", module)
    ]
    assert found == []


def names_of_the_package_itself(tree: ast.Module) -> Iterator[str]:
    """What is taken from `kd_plugin` and not from a folder in it: its public names come from everywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "kd_plugin")
        elif isinstance(node, ast.ImportFrom) and node.module == "kd_plugin":
            yield from (alias.name for alias in node.names)


def test_no_module_goes_round_the_contracts_through_the_package_itself(repo_root: Path) -> None:
    files = (repo_root / "kd_plugin").rglob("*.py")
    found = {path.name: [*names_of_the_package_itself(ast.parse(path.read_text(encoding="utf-8")))] for path in files}
    assert {name: names for name, names in found.items() if names} == {"commands.py": ["__version__"]}


OF_WRAPPERS = {"full_tensor", "to_local", "placements", "device_mesh", "ds_id", "ds_tensor", "ds_shape", "ds_numel"}


def names_of_wrappers(tree: ast.Module) -> Iterator[str]:
    """The modules of FSDP and DTensor that are imported, and the attributes by which a cut weight is known."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OF_WRAPPERS:
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in OF_WRAPPERS:
            yield node.value
        elif isinstance(node, ast.ImportFrom) and re.match(r"torch\.distributed\.(fsdp|tensor)", node.module or ""):
            yield node.module
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
            yield from (alias.name for alias in node.names if alias.name in ("fsdp", "tensor"))


def test_how_wrappers_cut_weights_is_known_in_two_folders(repo_root: Path) -> None:
    knows = {
        path.parent.name
        for path in (repo_root / "kd_plugin").rglob("*.py")
        if [*names_of_wrappers(ast.parse(path.read_text(encoding="utf-8")))]
    }
    assert knows == {"distributed", "engines"}


def test_the_tests_lie_in_the_folders_of_the_package(repo_root: Path) -> None:
    folders = {path.parent.name for path in (repo_root / "kd_plugin").glob("*/__init__.py")}
    tested = {path.parent.name for path in (repo_root / "tests").glob("*/test_*.py")}
    assert tested - folders == {"gpu", "ranks", "sweep"}
    assert folders - tested == set(), "every folder of the package has tests of its own"


def test_the_largest_folder_lists_its_modules_by_subject(repo_root: Path) -> None:
    folder = repo_root / "kd_plugin" / "plugin"
    listed = re.findall(r"`(\w+)`", (folder / "__init__.py").read_text(encoding="utf-8"))
    assert sorted([*listed, "__init__"]) == sorted(path.stem for path in folder.glob("*.py"))


@pytest.fixture
def copy(repo_root: Path, tmp_path: Path) -> Path:
    """The package and its contracts, to be changed."""
    pytest.importorskip("importlinter")
    shutil.copytree(repo_root / "kd_plugin", tmp_path / "kd_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repo_root / "pyproject.toml", tmp_path)
    return tmp_path


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT]
    environment = {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_a_planted_upward_import_breaks_the_contract(copy: Path) -> None:
    with (copy / "kd_plugin" / "loss" / "output.py").open("a", encoding="utf-8") as file:
        file.write("\nimport kd_plugin.plugin\n")
    done = linted(copy)
    assert done.returncode != 0
    assert "Imports point down BROKEN" in done.stdout, done.stdout
    assert re.search(r"Contracts: \d+ kept, 1 broken", done.stdout), done.stdout


def test_an_upward_import_for_types_alone_breaks_it_too(copy: Path) -> None:
    """The contracts exclude such imports, as Transformers' types are named in many places."""
    contracts = copy / "pyproject.toml"
    text = contracts.read_text(encoding="utf-8")
    everything = text.replace("exclude_type_checking_imports = true", "exclude_type_checking_imports = false")
    assert everything != text
    contracts.write_text(everything, encoding="utf-8")
    as_it_is = linted(copy)
    assert "Imports point down KEPT" in as_it_is.stdout, as_it_is.stdout
    with (copy / "kd_plugin" / "loss" / "output.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kd_plugin.plugin\n")
    done = linted(copy)
    assert "Imports point down BROKEN" in done.stdout, done.stdout


def test_without_it_every_contract_is_kept(copy: Path) -> None:
    done = linted(copy)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout), done.stdout
