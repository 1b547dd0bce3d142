"""Students made from a teacher: its configuration with other values, or some of its layers.

Notable decisions:
- a student is built from a configuration first and filled afterwards, so that what is exported reloads:
  layer numbers, per-layer attention kinds and tied weights are whatever the architecture itself makes of
  that configuration;
- settings that an architecture derives from a layer's position (attention kind, scale) are compared with the
  teacher's layer, so that a cut which changes a layer's meaning is refused instead of trained.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_plugin.models.quantization import quantization_method

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["StudentError", "config_with", "evenly_spaced", "freeze", "student_from_layers"]

# Written into every configuration by Transformers; none of it describes the architecture.
_BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "quantization_config",
    "transformers_version",
}


class StudentError(ValueError):
    """A student cannot be made as configured."""


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """Indices of the layers to keep, first and last included: distil-whisper's rule, 32 -> 4 is [0, 10, 20, 31].

    Raises:
        StudentError: fewer than 2 layers wanted, or more than there are.
    """
    if not 2 <= num_kept <= num_layers:
        raise StudentError(
            f"student.from_teacher.layers is {num_kept}, but the teacher has {num_layers} layers: "
            f"give a number from 2 to {num_layers}"
        )
    return [index * (num_layers - 1) // (num_kept - 1) for index in range(num_kept)]


def config_with(config: PreTrainedConfig, values: dict[str, Any], *, where: str) -> PreTrainedConfig:
    """A copy of `config` with `values` replaced, checked by its own class; `where` names them in errors.

    Lists with one entry per layer that are not given are derived anew when the number of layers changes.

    Raises:
        StudentError: unknown key, value refused by the architecture, or a multimodal configuration.
    """
    _require_plain(config, where)
    _check_known(config, values, where)
    aliases = type(config).attribute_map
    values = {aliases.get(key, key): value for key, value in values.items()}
    base = {key: value for key, value in config.to_dict().items() if key not in _BOOKKEEPING}
    if aliases.get("num_hidden_layers", "num_hidden_layers") in values:
        base = {key: value for key, value in base.items() if key not in per_layer_lists(config)}
    try:
        new = type(config).from_dict({**base, **values})
    # Configuration classes raise what they like, also huggingface_hub's direct subclasses of Exception.
    except Exception as error:
        raise StudentError(f"{where}: {_one_line(error)}") from error
    _check_heads(new, where)
    return new


def student_from_layers(
    teacher: PreTrainedModel, num_kept: int, make_empty: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """Make a model with `num_kept` of the teacher's decoder layers and copies of everything else.

    Args:
        teacher: a causal LM whose layers lie in one ModuleList; it is left untouched.
        num_kept: number of layers kept, evenly spaced.
        make_empty: builds a model of the teacher's class from a configuration, weights unset.

    Raises:
        StudentError: `num_kept` is too many, layers of this architecture depend on their position, or the teacher's
            weights are quantised.
    """
    where = "student.from_teacher"
    _require_plain(teacher.config, where)
    if method := quantization_method(teacher):
        raise StudentError(
            f"{where}: the weights of teacher.model are quantised ({method}), and a student is trained in fp32: name a "
            "checkpoint that is not, and set teacher.quantization, or use student.model or student.from_config"
        )
    num_layers = teacher.config.num_hidden_layers
    kept = evenly_spaced(num_layers, num_kept)
    per_layer = {key: [list_[i] for i in kept] for key, list_ in per_layer_lists(teacher.config).items()}
    config = config_with(teacher.config, {"num_hidden_layers": num_kept, **per_layer}, where=where)
    student = make_empty(config)
    path = _layers_path(teacher, num_layers)
    _check_same_meaning(student, teacher, path, kept)
    _copy_state(student, teacher, path, kept)
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def freeze(student: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose name contains one of `patterns`.

    Raises:
        StudentError: a pattern matches nothing, or nothing is left to train.
    """
    # Duplicates are kept so that a tied head can be named either way.
    named = list(student.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matches = [parameter for name, parameter in named if pattern in name]
        if not matches:
            close = difflib.get_close_matches(pattern, [name for name, _ in named], n=1, cutoff=0.4)
            example = close[0] if close else named[0][0]
            raise StudentError(f"student.freeze: {pattern!r} is in no parameter's name; names look like {example!r}")
        for parameter in matches:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise StudentError("student.freeze: every parameter is frozen, nothing would be trained; freeze less")


def per_layer_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The configuration's lists with one entry per layer, such as `layer_types`."""
    num_layers = config.num_hidden_layers
    return {
        key: list(value)
        for key, value in config.to_dict().items()
        # Lists of token ids can have that length by chance.
        if isinstance(value, list | tuple) and len(value) == num_layers
        if "token" not in key and key not in _BOOKKEEPING
    }


def _require_plain(config: PreTrainedConfig, where: str) -> None:
    if config.get_text_config(decoder=True) is not config:
        raise StudentError(
            f"{where}: {config.model_type!r} is multimodal or encoder-decoder; only plain causal language "
            "models can be re-configured, use student.model"
        )


def _check_known(config: PreTrainedConfig, values: Iterable[str], where: str) -> None:
    known = _known_keys(config)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
            raise StudentError(f"{where}.{key}: unknown key of a {config.model_type!r} configuration{hint}")


def _known_keys(config: PreTrainedConfig) -> set[str]:
    own = {field.name for field in fields(config)} | set(config.to_dict()) | set(type(config).attribute_map)
    return {key for key in own if not key.startswith("_")} - _BOOKKEEPING


def _check_heads(config: PreTrainedConfig, where: str) -> None:
    """Refuse heads that cannot be grouped, which the first forward pass would notice as a shape error."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads and heads % groups:
        raise StudentError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; set both"
        )


def _layers_path(model: nn.Module, num_layers: int) -> str:
    """Name of the ModuleList of decoder layers; outer modules come first, so it cannot be one of experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise StudentError(
        f"student.from_teacher: {type(model).__name__} has no list of {num_layers} layers to take from; "
        "use student.model or student.from_config"
    )


def _copy_state(student: nn.Module, teacher: nn.Module, path: str, kept: list[int]) -> None:
    """Copy values (never storage) from the teacher; layer i comes from layer kept[i]."""
    prefix = f"{path}."
    source = teacher.state_dict()
    state = {}
    for name in student.state_dict():
        origin = name
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            origin = f"{prefix}{kept[int(index)]}.{rest}"
        if origin not in source:
            raise StudentError(
                f"student.from_teacher: the teacher has no {origin!r} for the student's {name!r}: "
                f"layers of {type(teacher).__name__} differ by position; use student.model or .from_config"
            )
        state[name] = source[origin]
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise StudentError(f"student.from_teacher: {_one_line(error)}") from error


def _check_same_meaning(student: nn.Module, teacher: nn.Module, path: str, kept: list[int]) -> None:
    """Refuse a cut in which a layer's plain settings (window, scale, ...) come out unlike its original's."""
    new_layers, old_layers = student.get_submodule(path), teacher.get_submodule(path)
    assert isinstance(new_layers, nn.ModuleList) and isinstance(old_layers, nn.ModuleList)
    pairs = zip(new_layers, [old_layers[i] for i in kept], strict=True)
    for position, (new_layer, old_layer) in enumerate(pairs):
        old_modules = dict(old_layer.named_modules())
        for name, module in new_layer.named_modules():
            new, old = _plain_settings(module), _plain_settings(old_modules.get(name))
            different = sorted(key for key in new.keys() & old.keys() if new[key] != old[key])
            if different:
                key = different[0]
                raise StudentError(
                    f"student.from_teacher: the teacher's layer {kept[position]} has "
                    f"{name or 'layer'}.{key} = {old[key]!r}, but as the student's layer {position} "
                    f"it would have {new[key]!r}; use student.from_config"
                )


def _plain_settings(module: nn.Module | None) -> dict[str, Any]:
    return {
        key: value
        for key, value in (vars(module) if module is not None else {}).items()
        if isinstance(value, bool | int | float | str)
        # A layer's number is the one thing that has to change.
        if key not in ("training", "layer_idx", "layer_id", "layer_number") and not key.startswith("_")
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
