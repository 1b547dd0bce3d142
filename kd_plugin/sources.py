"""Where a model or tokenizer lies: a setting to a folder or hub id, without loading anything. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from kd_plugin.config import ModelSource, StudentConfig, TeacherConfig

__all__ = ["ModelError", "ResolvedSource", "is_local", "resolve_source", "resolve_tokenizer", "section_name"]


class ModelError(ValueError):
    """A model or tokenizer cannot be found or loaded as configured."""


class ResolvedSource(NamedTuple):
    """What `from_pretrained` is called with."""

    path_or_id: str
    """Local directory, or hub id."""

    gguf_file: str | None
    """Name of the GGUF file inside it."""


def resolve_source(config: ModelSource) -> ResolvedSource:
    """Find the files behind `config.model` without loading or importing anything.

    Raises:
        ModelError: no such package, directory or GGUF file, or several GGUF files to choose from.
    """
    if not config.model:
        raise ModelError(f"{section_name(config)}.model is missing: give a hub id, a directory or package:NAME")
    return _resolve(config.model, config.gguf_file, f"{section_name(config)}.model")


def resolve_tokenizer(config: ModelSource) -> ResolvedSource:
    """Find the files behind `config.tokenizer`, or else those of `config.model`.

    Raises:
        ModelError: as `resolve_source`.
    """
    if config.tokenizer:
        return _resolve(config.tokenizer, None, f"{section_name(config)}.tokenizer")
    return resolve_source(config)


def is_local(name: str) -> bool:
    """Whether `name` is on this machine: a package, or a file or folder that exists."""
    return name.startswith("package:") or Path(name).expanduser().exists()


def section_name(config: ModelSource) -> str:
    """The YAML section that `config` came from."""
    return {TeacherConfig: "teacher", StudentConfig: "student"}.get(type(config), "model")


def _resolve(name: str, gguf_file: str | None, where: str) -> ResolvedSource:
    if name.startswith("package:"):
        folder = _package_folder(name.removeprefix("package:"), where)
    else:
        folder = Path(name).expanduser()
        if folder.is_file() and folder.suffix == ".gguf":
            return ResolvedSource(str(folder.parent), folder.name)
        if folder.is_file():
            raise ModelError(f"{where}: {name} is a file; give the directory it lies in")
        if not folder.is_dir():
            if name.count("/") > 1 or name.startswith((".", "~", "/")):
                raise ModelError(f"{where}: no such directory {name}; give a directory, hub id or package:NAME")
            return ResolvedSource(name, gguf_file)
    if gguf_file:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"{where}: no {gguf_file} in {folder}; found: {_names(folder.rglob('*.gguf'))}")
        return ResolvedSource(str(folder), gguf_file)
    return _look_inside(folder, where)


def _look_inside(folder: Path, where: str) -> ResolvedSource:
    """A folder that Transformers can read as it is, or the one GGUF file below it."""
    if any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return ResolvedSource(str(folder), None)
    found = sorted(folder.rglob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{where}: {len(found)} GGUF files in {folder}: {_names(found)}; choose one with gguf_file")
    if not found:
        raise ModelError(
            f"{where}: neither a config.json nor a GGUF file in {folder}: name the folder that save_pretrained wrote"
        )
    return ResolvedSource(str(found[0].parent), found[0].name)


def _package_folder(name: str, where: str) -> Path:
    """Folder of an installed package; a dotted name is a folder in it (nothing may be imported)."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None:
        raise ModelError(f"{where}: no installed package {top!r}; install it with pip (where '_' may be '-')")
    if not spec.submodule_search_locations:
        raise ModelError(f"{where}: {top!r} is a single module, not a package with files in it")
    folder = Path(next(iter(spec.submodule_search_locations)), *inner)
    if not folder.is_dir():
        raise ModelError(f"{where}: package {top!r} has no folder {'/'.join(inner)!r}")
    return folder


def _names(paths: Any) -> str:
    return ", ".join(sorted(path.name for path in paths)) or "none"
