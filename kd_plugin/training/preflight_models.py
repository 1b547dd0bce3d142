"""What local models and installed packages say about a run, with nothing loaded. Imports no torch.

Models on the hub and GGUF files are passed over: what is wrong with them is found when they are loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_plugin.data.records import is_hub_dataset
from kd_plugin.models.files import ModelError, resolve_source, resolve_tokenizer, tensor_shapes
from kd_plugin.settings.extras import missing
from kd_plugin.settings.run import ModelSource, RunConfig
from kd_plugin.training.preflight_quantization import missing_quantisers

__all__ = ["missing_packages", "model_problems", "model_warnings"]

_OTHER_NAMES = {
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
}


def missing_packages(config: RunConfig) -> list[str]:
    """One line for each optional package that the run needs and that is not installed."""
    lines = [missing("transformers", "loading models needs it")]
    if config.student.lora is not None:
        lines.append(missing("peft", "student.lora needs it"))
    if config.log.tensorboard:
        lines.append(missing("tensorboard", "log.tensorboard needs it (false does without)"))
    sources = [source.source for _, source, _ in config.data.sources()] + (
        [config.data.eval] if config.data.eval else []
    )
    if any(map(is_hub_dataset, sources)):
        lines.append(missing("datasets", "a dataset's name needs it"))
    for tracker in sorted(set(config.log.report_to) - {"tensorboard"}):
        lines.append(missing("accelerate", f"log.report_to {tracker} needs it"))
        if importlib.util.find_spec(tracker) is None:
            lines.append(f"{tracker} is not installed and log.report_to names it: pip install {tracker}")
    lines += missing_quantisers(config)
    return [line for line in lines if line]


def model_problems(config: RunConfig) -> list[str]:
    """One line for each fault of layers, heads or positions that a local config.json shows."""
    teacher, student = _config_of(config.teacher), _student_config(config)
    return [
        *_layer_problems(config, teacher),
        *_head_problems(config, student),
        *_position_problems(config, teacher, student),
    ]


def model_warnings(config: RunConfig) -> list[str]:
    """One line for what a run will warn of: positions never seen in training, tokens that a model lacks."""
    models = {"teacher": _config_of(config.teacher), "student": _student_config(config)}
    warnings, num_tokens = [], _num_tokens(config, models)
    for role, model in models.items():
        limit, size = model.get("max_position_embeddings"), model.get("vocab_size")
        if isinstance(limit, int) and 0 < limit < config.data.seq_len and not _learnt_positions(config, role):
            warnings.append(f"data.seq_len {config.data.seq_len} is beyond the {role}'s {limit} positions")
        if isinstance(size, int) and num_tokens > size:
            warnings.append(
                f"the tokenizer has {num_tokens} ids and the {role} embeds {size}: text with any other is refused"
            )
    return warnings


def _config_of(source: ModelSource) -> dict[str, Any]:
    """The text part of the config.json of a local model, by one set of names; empty where there is none to read."""
    folder = _folder_of(source)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):  # GGUF files and the hub have none, and a damaged one is named when it is loaded
        return {}
    values = values.get("text_config", values) if isinstance(values, dict) else {}
    return _renamed(values) if isinstance(values, dict) else {}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {_OTHER_NAMES.get(key, key): value for key, value in values.items()}


def _folder_of(source: ModelSource) -> Path | None:
    if not source.model:
        return None
    try:
        found = resolve_source(source)
    except ModelError:  # which is reported elsewhere
        return None
    return None if found.gguf_file else Path(found.path_or_id)


def _student_config(config: RunConfig) -> dict[str, Any]:
    student = config.student
    base = _config_of(student if student.model else config.teacher)
    if student.from_teacher and base:
        return {**base, "num_hidden_layers": student.from_teacher.layers}
    return {**base, **_renamed(student.from_config or {})} if base else {}


def _layer_problems(config: RunConfig, teacher: dict[str, Any]) -> Iterator[str]:
    cut, there = config.student.from_teacher, teacher.get("num_hidden_layers")
    if cut and isinstance(there, int) and cut.layers > there:
        yield (
            f"student.from_teacher.layers is {cut.layers}, but the teacher has {there} layers: "
            f"give a number from 2 to {there}"
        )


def _head_problems(config: RunConfig, student: dict[str, Any]) -> Iterator[str]:
    """Heads that do not divide, where `student.from_config` has changed one of the numbers."""
    given = _renamed(config.student.from_config or {})
    width, heads = student.get("hidden_size"), student.get("num_attention_heads")
    groups = student.get("num_key_value_heads") or heads
    if not given.keys() & {"hidden_size", "num_attention_heads", "num_key_value_heads"}:
        return
    if not (isinstance(heads, int) and isinstance(groups, int) and heads > 0 and groups > 0):
        return
    if heads % groups:
        yield (
            f"student.from_config: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; set both"
        )
    if isinstance(width, int) and width % heads and not student.get("head_dim") and not student.get("d_kv"):
        yield f"student.from_config: hidden_size {width} is no multiple of num_attention_heads {heads}; set both"


def _position_problems(config: RunConfig, teacher: dict[str, Any], student: dict[str, Any]) -> Iterator[str]:
    for role, model in (("teacher", teacher), ("student", student)):
        limit = model.get("max_position_embeddings")
        if isinstance(limit, int) and 0 < limit < config.data.seq_len and _learnt_positions(config, role):
            yield (
                f"data.seq_len {config.data.seq_len} is beyond the {role}'s {limit} positions, each of which it has "
                f"learnt: set data.seq_len to {limit} or less"
            )


def _learnt_positions(config: RunConfig, role: str) -> bool:
    """Whether the weights that the model has, or is shaped after, hold a table with one row per position."""
    own = role == "student" and config.student.model
    folder = _folder_of(config.student if own else config.teacher)
    shapes = tensor_shapes(folder) if folder else {}
    tables = (name for name, shape in shapes.items() if len(shape) == 2)
    return any("position" in name or name.startswith("wpe.") or ".wpe." in name for name in tables)


def _num_tokens(config: RunConfig, models: dict[str, dict[str, Any]]) -> int:
    """Ids of the run's tokenizer where the models embed unlike many; 0 where nothing has to be known of it."""
    if len({model.get("vocab_size") for model in models.values()}) < 2:
        return 0
    source = config.student if config.student.tokenizer else config.teacher
    try:
        path = Path(resolve_tokenizer(source).path_or_id) / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", ()))]
        return max(ids, default=-1) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another kind of tokenizer, or on the hub
        return 0
