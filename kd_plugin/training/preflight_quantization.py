"""What quantised teachers and 8-bit optimizers do not go together with, found before anything is loaded.

Imports no torch. A checkpoint on this machine that says that it is quantised is a quantised teacher, too; of one on the
hub it is seen once it is loaded, and judged by the same rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_plugin.engines import zero_block
from kd_plugin.models.files import ModelError, resolve_source
from kd_plugin.settings.extras import missing
from kd_plugin.settings.quantization import STAY_PACKED, method_of, mixes_rows
from kd_plugin.settings.run import ModelSource, RunConfig

__all__ = ["missing_quantisers", "quantised_layout_problems", "quantization_problems"]


def missing_quantisers(config: RunConfig) -> list[str]:
    """One line for each package that quantises for this run and is not installed; empty ones where it is."""
    lines = []
    if config.teacher.quantization is not None:
        lines.append(missing(method_of(config.teacher.quantization), "teacher.quantization needs it"))
    if config.train.optimizer == "adamw_8bit":
        lines.append(missing("torchao", "train.optimizer adamw_8bit needs it"))
    return lines


def quantization_problems(config: RunConfig, mode: str | None) -> list[str]:
    """One line for each fault of a quantised model, or of 8-bit states, whatever the number of ranks.

    `mode` is `train.parallel`, resolved; None where the launch is not known.
    """
    return [*_of_checkpoints(config), *_of_packing(config), *_of_optimizer(config, mode)]


def quantised_layout_problems(
    config: RunConfig, mode: str | None, world_size: int | None, *, found: str | None = None
) -> list[str]:
    """One line for each setting that would spread a quantised teacher over ranks or memories.

    Args:
        config: the run.
        mode: `train.parallel`, resolved; None where it is not known.
        world_size: number of ranks; None where it is not known.
        found: how the teacher that was loaded is quantised, "" for not; None before it is.
    """
    teacher = config.teacher
    method = _checkpoint_method(teacher) if found is None else found
    if teacher.quantization is None and not method:
        return []
    what = f"teacher.quantization is {_shown(teacher.quantization)}"
    if teacher.quantization is None:
        what = f"teacher.model {teacher.model} is quantised ({method})"
    problems = []
    alone = world_size == 1 or "single" in (mode, config.train.parallel)
    if teacher.sharding == "shard" and not alone:
        problems.append(
            f"{what}, but teacher.sharding is shard, and no wrapper cuts quantised weights over the ranks: set "
            "teacher.sharding to replicate"
        )
    if teacher.offload:
        problems.append(
            f"{what}, but teacher.offload is true, and no wrapper brings quantised weights from host memory layer by "
            "layer: set teacher.offload to false"
        )
    if (method or method_of(teacher.quantization or "int8")) == "torchao" and _replaces_linear(config, mode):
        problems.append(
            f"{what}, but ZeRO-3 replaces torch.nn.functional.linear by one that torchao's weights do not know: set "
            "deepspeed.zero_optimization.memory_efficient_linear to false"
        )
    return problems


def _replaces_linear(config: RunConfig, mode: str | None) -> bool:
    if (mode or config.train.parallel) != "deepspeed" or zero_block.zero_stage(config.deepspeed) != 3:
        return False
    options = (config.deepspeed or {}).get("zero_optimization")
    return not isinstance(options, dict) or options.get("memory_efficient_linear", True) is not False


def _of_checkpoints(config: RunConfig) -> Iterator[str]:
    teacher, student = config.teacher, config.student
    method = _checkpoint_method(teacher)
    if method and teacher.quantization is not None:
        yield (
            f"teacher.quantization is {_shown(teacher.quantization)}, but teacher.model {teacher.model} is quantised "
            f"already ({method}): leave teacher.quantization out"
        )
    if method and student.from_teacher:
        yield (
            f"student.from_teacher: the weights of teacher.model {teacher.model} are quantised ({method}), and a "
            "student is trained in fp32: name a checkpoint that is not, and set teacher.quantization"
        )
    if student.model and student.from_config is None and (of_student := _checkpoint_method(student)):
        yield (
            f"student.model {student.model} is quantised ({of_student}), and a student is trained in fp32: name a "
            "checkpoint that is not quantised"
        )


def _of_packing(config: RunConfig) -> Iterator[str]:
    quantization = config.teacher.quantization
    if quantization is not None and config.data.packing == "isolated" and mixes_rows(quantization):
        yield (
            f"teacher.quantization is {_shown(quantization)} (LLM.int8), by whose outliers documents of a sequence act "
            "on each other, but data.packing is isolated: set teacher.quantization to int8 or {load_in_8bit: true, "
            "llm_int8_threshold: 0.0}, or data.packing to joined"
        )


def _of_optimizer(config: RunConfig, mode: str | None) -> Iterator[str]:
    if config.train.optimizer != "adamw_8bit":
        return
    mode = mode or config.train.parallel
    if mode == "deepspeed" and not (config.deepspeed or {}).get("optimizer"):
        yield (
            "train.optimizer is adamw_8bit, whose states ZeRO cannot cut: set train.parallel to fsdp, or "
            "train.optimizer to auto"
        )
    if mode == "fsdp1":
        yield (
            "train.optimizer is adamw_8bit, whose states FSDP1 cannot put together again: set train.parallel to fsdp, "
            "or train.optimizer to auto"
        )


def _checkpoint_method(source: ModelSource) -> str:
    """How the checkpoint of a local model is quantised for good, by its config.json; "" where that does not say so."""
    values = _config_json(source)
    inner = values.get("text_config")
    block = values.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    method = method_of(block) if isinstance(block, dict) else ""
    return method if method in STAY_PACKED else ""


def _config_json(source: ModelSource) -> dict[str, Any]:
    try:
        found = resolve_source(source)
        text = "" if found.gguf_file else (Path(found.path_or_id) / "config.json").read_text(encoding="utf-8")
        values = json.loads(text or "{}")
    except (ModelError, OSError, ValueError):  # which is reported elsewhere
        return {}
    return values if isinstance(values, dict) else {}


def _shown(quantization: object) -> str:
    return quantization if isinstance(quantization, str) else json.dumps(quantization, default=str)
