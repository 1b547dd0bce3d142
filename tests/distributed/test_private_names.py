"""Private names of torch stand in two modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Dictionaries of every nn.Module, on which the libraries around torch rely, too.
OF_MODULES = {"_buffers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters"}
ROOMS = ("torch_internals.py", "compiler_internals.py")
OF_OTHERS = {"_attn_implementation", "_exit", "_fingerprint", "_from_config", "_getframe", "_replace"}  # not torch's


def sources() -> dict[Path, ast.Module]:
    files = sorted((ROOT / "kd_plugin").rglob("*.py"))
    return {file: ast.parse(file.read_text()) for file in files if file.name not in ROOMS}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that kd_plugin's classes define."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return names | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private attributes of anything but `self` and `cls`, private modules and names imported, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            path = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [*path.split("."), *(part for alias in node.names for part in alias.name.split("."))]:
                if is_private(name):
                    yield node.lineno, name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield node.lineno, name.value


# By getattr: accelerate's hook, transformers' list of layers, and its mark of an adapter
OF_LIBRARIES = {"_hf_hook", "_no_split_modules", "_hf_peft_config_loaded"}


def test_no_other_module_uses_private_names_of_torch() -> None:
    trees = sources()
    known = OF_MODULES | OF_OTHERS | OF_LIBRARIES | own_names(list(trees.values()))
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file, tree in trees.items()
        for line, name in private_names(tree)
        if name not in known
    ]
    assert not found


def test_the_rule_sees_each_way_to_a_private_name() -> None:
    text = "import torch._C\nfrom torch import _dynamo\ntorch._ops\ngetattr(group, '_device_types')\nself._own"
    assert [name for _, name in private_names(ast.parse(text))] == ["_C", "_dynamo", "_ops", "_device_types"]
