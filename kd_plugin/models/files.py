"""Where a model or tokenizer lies, and whether its files are whole, without loading anything. Imports no torch.

A broken download is the most common reason why a folder cannot be loaded, and no library names the file. What a
safetensors file says of itself in its first bytes is enough to tell, so every run asks before it loads.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kd_plugin.settings.run import ModelSource, StudentConfig, TeacherConfig

__all__ = [
    "ModelError",
    "ResolvedSource",
    "broken_file",
    "check_weights",
    "is_local",
    "resolve_source",
    "resolve_tokenizer",
    "section_name",
    "tensor_shapes",
]


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
        ModelError: no such package, directory or GGUF file, several GGUF files to choose from, or an adapter.
    """
    where = f"{section_name(config)}.model"
    if not config.model:
        raise ModelError(f"{where} is missing: give a hub id, a directory or package:NAME")
    return _resolve(config.model, config.gguf_file, where, adapters=False)


def resolve_tokenizer(config: ModelSource) -> ResolvedSource:
    """Find the files behind `config.tokenizer`, or else those of `config.model`.

    Raises:
        ModelError: no such package, directory or GGUF file, or several GGUF files to choose from.
    """
    if config.tokenizer:
        return _resolve(config.tokenizer, None, f"{section_name(config)}.tokenizer", adapters=True)
    return resolve_source(config)


def check_weights(config: ModelSource) -> None:
    """Look whether the safetensors files of `config.model` are there and whole, where they are on this machine.

    Raises:
        ModelError: a file is missing or damaged, which the message names, or `config.model` cannot be resolved.
    """
    source = resolve_source(config)
    if not source.gguf_file and (fault := next(_broken_weights(Path(source.path_or_id)), "")):
        raise ModelError(f"{section_name(config)}.model: {source.path_or_id}: {fault}")


def broken_file(source: ResolvedSource) -> str:
    """What is wrong with the first broken file of a folder that cannot be loaded; empty where none is found."""
    folder = Path(source.path_or_id)
    if source.gguf_file or not folder.is_dir():
        return ""
    return next(_broken_files(folder), "")


def is_local(name: str) -> bool:
    """Whether `name` is on this machine: a package, or a file or folder that exists."""
    return name.startswith("package:") or Path(name).expanduser().exists()


def section_name(config: ModelSource) -> str:
    """The YAML section that `config` came from."""
    return {TeacherConfig: "teacher", StudentConfig: "student"}.get(type(config), "model")


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name of each tensor in the safetensors files of `folder` -> its shape; damaged files are passed over."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(length, path.stat().st_size)))
                shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return shapes


ADAPTER_FOUND = (
    "a PEFT adapter, not a model: merge it into its base (peft.AutoPeftModelForCausalLM.from_pretrained(...)"
    ".merge_and_unload().save_pretrained(DIR)) and name DIR, or name the base (student.lora trains new adapters on it)"
)
_AGAIN = "download or copy it again"


def _broken_files(folder: Path) -> Iterator[str]:
    yield from _broken_weights(folder)
    yield from _failing(folder.glob("*.json"), "no JSON", lambda file: json.loads(file.read_text(encoding="utf-8")))
    for file in sorted(folder.glob("pytorch_model*.bin")):
        if not zipfile.is_zipfile(file):
            yield f"{file.name} is cut short or no weights: {_AGAIN}"


def _failing(files: Iterator[Path], what: str, read: Callable[[Path], object]) -> Iterator[str]:
    for file in sorted(files):
        try:
            read(file)
        except (OSError, ValueError) as error:
            yield f"{file.name} is {what} ({error}): {_AGAIN}"


def _broken_weights(folder: Path) -> Iterator[str]:
    """What is wrong with the files that `from_pretrained` reads: one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, TypeError, KeyError, AttributeError):
            yield f"{index.name} is no list of weights: {_AGAIN}"
            return
    else:
        return
    for file in files:
        if not file.is_file():
            yield f"{file.name} is missing, which {index.name} names: {_AGAIN}"
        elif fault := _broken_safetensors(file):
            yield f"{file.name} {fault}"


def _broken_safetensors(path: Path) -> str:
    """What is wrong with a safetensors file; empty where nothing is.

    It begins with the length of a JSON header, which has each tensor's place: the file's size follows from them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            file.seek(0)
            if file.read(24) == b"version https://git-lfs.":
                return "is a pointer of Git LFS, not the weights: run `git lfs pull` there"
            return f"is cut short or no safetensors file ({size} bytes): {_AGAIN}"
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"is no safetensors file: {_AGAIN}"
    wanted = 8 + length + max(ends, default=0)
    return "" if size == wanted else f"is cut short or damaged ({size} bytes, should be {wanted}): {_AGAIN}"


def _resolve(name: str, gguf_file: str | None, where: str, *, adapters: bool) -> ResolvedSource:
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
    if not adapters and (folder / "adapter_config.json").is_file():
        raise ModelError(f"{where}: {folder} is {ADAPTER_FOUND}")
    return _look_inside(folder, where)


def _look_inside(folder: Path, where: str) -> ResolvedSource:
    """`folder` itself, if Transformers can read it as it is, or the one GGUF file below it."""
    if any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return ResolvedSource(str(folder), None)
    files = sorted(folder.rglob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{where}: {len(files)} GGUF files in {folder}: {_names(files)}; choose one with gguf_file")
    if not files:
        raise ModelError(
            f"{where}: neither a config.json nor a GGUF file in {folder}: name the folder that save_pretrained wrote"
        )
    return ResolvedSource(str(files[0].parent), files[0].name)


def _package_folder(name: str, where: str) -> Path:
    """The folder of an installed package; a dotted name is a folder in it. Nothing is imported."""
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


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths)) or "none"
