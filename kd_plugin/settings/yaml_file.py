# pyright: strict
# pyright: reportMatchNotExhaustive=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnnecessaryIsInstance=false
"""YAML files and `section.key=value` overrides -> RunConfig; RunConfig -> YAML. Imports no torch.

Notable decisions:
- OmegaConf reads and merges (it takes `1e-4` for a number and refuses duplicate keys; plain PyYAML does
  neither), pydantic checks;
- all errors come at once, one line each, with the line of the file that they are about.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kd_plugin.settings.aliases import KEYS, VALUES
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.schema import field_schema, known_keys, wanted

__all__ = ["ConfigError", "load_config", "to_yaml"]

Keys = tuple[str, ...]
_COMMAND_LINE = "<command line>"


class ConfigError(ValueError):
    """A configuration that cannot be used; one line per fault: `file:line: section.key: what (got ...)`."""


def load_config(path: str | Path, overrides: Sequence[str] | str = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (one, or a list of them), check everything.

    Raises:
        ConfigError: with every fault, one line each.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"load_config wants the path of a YAML file, found a {type(path).__name__}")
    overrides = [overrides] if isinstance(overrides, str) else overrides
    if not isinstance(overrides, Sequence):
        raise ConfigError(
            f'load_config wants overrides as "section.key=value", one or a list of them, found a '
            f'{type(overrides).__name__}: load_config(PATH, ["train.learning_rate=1e-4"])'
        )
    path = Path(path)
    document, lines = _parse(path, _read(path))
    changes, faults = _parse_overrides(overrides)
    where = _Places(path, lines, [keys for keys, _ in changes])
    values = _merged(document, [change for _, change in changes], where, faults)
    return _validated(values, where, faults)


def _merged(document: DictConfig, changes: Sequence[DictConfig], where: _Places, faults: list[str]) -> Any:
    """The values of file and command line; a value that cannot be resolved is raised with the earlier `faults`."""
    merged: Any = OmegaConf.merge(document, *changes)
    try:
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        keys = tuple((error.full_key or "").split("."))
        message = str(error).splitlines()[0]
        raise ConfigError("\n".join([*faults, f"{where(keys)}: {'.'.join(keys)}: {message}"])) from None


def _validated(values: Any, where: _Places, faults: list[str]) -> RunConfig:
    """The configuration of `values`; what is wrong with them is raised with the earlier `faults`."""
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(_without_empty_sections(values))
    except ValidationError as error:
        faults = [*faults, *_fault_lines(error, values, where)]
    if faults or config is None:
        raise ConfigError("\n".join(faults))
    return config


def to_yaml(run_config: RunConfig) -> str:
    """The resolved configuration, every default written out; `load_config` reads it back as it is."""
    values = _escaped(run_config.model_dump(mode="json"))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _escaped(value: Any) -> Any:
    """`value` with `${` as text, not as a reference to another setting."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "`kd-plugin configs` lists the recipes, `kd-plugin configs NAME --copy .` copies one"
        raise ConfigError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory; name a YAML file in it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _parse(path: Path, text: str) -> tuple[DictConfig, dict[Keys, int]]:
    """The file's content, and the line of each of its keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            sections = ", ".join(known_keys(()))
            raise ConfigError(f"{path}:1: holds no sections; wants a mapping with the keys {sections}")
        document = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_yaml_problem(error)}") from None
    except yaml.YAMLError as error:  # e.g. control characters
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:  # e.g. an unclosed ${
        raise ConfigError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    return document if isinstance(document, DictConfig) else OmegaConf.create({}), dict(_key_lines(node))


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    return f"{problem}; keep one of them" if "duplicate" in problem else problem


def _key_lines(node: yaml.Node | None, keys: Keys = ()) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _key_lines(value, inner)


def _parse_overrides(overrides: Sequence[str]) -> tuple[list[tuple[Keys, DictConfig]], list[str]]:
    changes: list[tuple[Keys, DictConfig]] = []
    faults: list[str] = []
    for token in overrides:
        if not isinstance(token, str):
            faults.append(f"{_COMMAND_LINE}: {token!r}: is no text; write 'section.key=value'")
            continue
        keys = tuple(token.partition("=")[0].split("."))
        fault = _form_fault(token, keys)
        if not fault:
            try:
                changes.append((keys, OmegaConf.from_dotlist([token])))
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                fault = f"value cannot be read as YAML ({str(error).splitlines()[0]}); quote it"
        if fault:
            faults.append(f"{_COMMAND_LINE}: {token}: {fault}")
    return changes, faults


def _form_fault(token: str, keys: Keys) -> str:
    """Why an override is not of the form section.key=value; empty where it is."""
    _, equals, value = token.partition("=")
    if token.startswith("-"):
        return "overrides have no dashes; write section.key=value"
    if not equals:
        return "has no '='; write section.key=value"
    if not all(keys):
        return "has an empty key; write section.key=value"
    return "" if value else "has no value; write null for none or '' for empty text"


class _Places:
    """Says where a key was written: `file:line`, or the command line."""

    def __init__(self, path: Path, lines: dict[Keys, int], overridden: list[Keys]) -> None:
        self.path, self.lines, self.overridden = path, lines, overridden

    def __call__(self, keys: Keys) -> str:
        if any(keys[: len(override)] == override for override in self.overridden):
            return _COMMAND_LINE
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.lines:
                return f"{self.path}:{self.lines[keys[:length]]}"
            if any(override[:length] == keys[:length] for override in self.overridden):
                return _COMMAND_LINE
        return str(self.path)


def _without_empty_sections(values: Any) -> dict[str, Any]:
    # `distill:` with all its lines commented out reads as null, and means the defaults
    return {key: value for key, value in values.items() if value is not None}


def _fault_lines(error: ValidationError, values: Any, where: _Places) -> list[str]:
    lines: dict[str, None] = {}  # in order; the members of a union each report, and one line is enough
    details = error.errors()
    in_items = {detail["loc"][:at] for detail in details if (at := _union_member(detail["loc"]))}
    for detail in details:
        if detail["loc"][:-1] in in_items:  # a list was given, so the other members of the union say nothing
            continue
        keys, schema = field_schema(detail["loc"])
        if detail["type"] in ("extra_forbidden", "invalid_key"):
            keys = tuple(str(part) for part in detail["loc"] if "[" not in str(part))
        lines[f"{where(keys)}: {'.'.join(keys)}: {_what(detail, keys, schema, values)}"] = None
    return list(lines)


def _union_member(path: tuple[str | int, ...]) -> int:
    """Where on the path of a fault the name of a list stands that is one member of a union; 0 if nowhere."""
    inner = (at for at, part in enumerate(path[:-1]) if str(part).startswith("tuple["))
    return next(inner, 0)


def _what(detail: ErrorDetails, keys: Keys, schema: dict[str, Any], values: Any) -> str:
    given = _look_up(values, keys)
    got = f" (got {_show(given)})"
    about = f": {' '.join(schema['description'].split())}" if "description" in schema else ""
    match detail["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key; {_suggestion(keys)}{got}"
        case "missing" if given is None:
            return f"is missing; wants {wanted(schema)}{about}"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ") + ("" if isinstance(given, dict) else got)
        case "unknown_divergence":
            return detail["msg"] + got
        case "literal_error" if detail["loc"][-1] == "[key]":
            return f"knows no {detail['input']!r}; {detail['msg'].replace('Input should be', 'known are')}{got}"
        case "finite_number":
            return f"wants a finite number{got}"
    hint = "; null is written null" if given == "None" else ""
    if other := VALUES.get(".".join(keys), {}).get(str(given).lower()):
        hint = f"; did you mean {other!r}?"
    return f"wants {wanted(schema)}{hint}{got}"


def _suggestion(keys: Keys) -> str:
    *section, name = keys
    known = known_keys(tuple(section))
    here = KEYS.get(".".join([*section[-1:], name.lower()])) if section else None
    if not here and (homes := [home for home in known_keys(()) if name in known_keys((home,))]):
        return f"did you mean '{homes[0]}.{name}'?"
    if other := here or KEYS.get(name.lower()):
        home, _, key = other.rpartition(".")
        return f"did you mean '{key if home == '.'.join(section) else other}'?"
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    return f"known here: {', '.join(known)}"


def _look_up(values: Any, keys: Keys) -> Any:
    for key in keys:
        if isinstance(values, list) and key.isdigit():
            values = values[int(key)]
            continue
        if not isinstance(values, dict):
            return None
        values = values[key] if key in values else values.get(int(key) if key.isdigit() else key)
    return values


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
