"""What is wrong with a run, or without effect in it, found before anything is loaded. Imports no torch.

Notable decisions:
- a fault is worth reporting in the first second, so everything that a path, a package list or the `deepspeed:`
  block can tell is checked here, and all faults are reported at once;
- a setting without effect is a warning and not a fault, and only where it differs from its default: a saved
  config.yaml spells every default out.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVarTuple

from pydantic import BaseModel

from kd_plugin.data.records import check_source, has_splits, refuse_unused
from kd_plugin.engines import zero_block
from kd_plugin.models.files import check_weights, is_local, resolve_source, resolve_tokenizer, section_name
from kd_plugin.settings.distill import BUILT_IN
from kd_plugin.settings.run import DataConfig, DistillConfig, RunConfig, StudentConfig
from kd_plugin.training.preflight_input import input_problems
from kd_plugin.training.preflight_models import missing_packages, model_problems
from kd_plugin.training.preflight_quantization import quantised_layout_problems, quantization_problems
from kd_plugin.training.preflight_schedule import schedule_problems

__all__ = ["SetupError", "early_problems", "idle_settings", "layout_problems"]

Idle = Iterator[tuple[str, str]]


class SetupError(ValueError):
    """The run cannot start as configured; one line per fault."""


def early_problems(
    config: RunConfig, *, mode: str | None = None, world_size: int | None = None, accumulation: int | None = None
) -> list[str]:
    """One line for each fault that can be found without loading anything.

    Args:
        config: the run.
        mode: `train.parallel`, resolved; this and what follows are None where the launch is not known.
        world_size: number of ranks.
        accumulation: micro-batches per rank and step.
    """
    return [
        *missing_packages(config),
        *_source_problems(config),
        *model_problems(config),
        *quantization_problems(config, mode),
        *schedule_problems(config),
        *input_problems(config),
        *_data_problems(config.data),
        *_output_problems(Path(config.log.output_dir)),
        *layout_problems(config, mode, world_size),
        *_compile_problems(config, mode),
        *_deepspeed_problems(config, mode, world_size, accumulation),
    ]


def idle_settings(config: RunConfig, mode: str | None = None) -> list[str]:
    """One line `SETTING has no effect: WHY` for each that differs from its default and changes nothing in this run."""
    idle = [*_idle_sources(config), *_idle_data(config.data), *_idle_objective(config.distill), *_idle_run(config)]
    idle += _idle_layout(config, mode)
    return [f"{name} has no effect: {why}" for name, why in idle]


_Arguments = TypeVarTuple("_Arguments")


def _faults_of(check: Callable[[*_Arguments], object], *arguments: *_Arguments) -> list[str]:
    try:
        check(*arguments)
    except ValueError as error:
        return [str(error)]
    return []


def _source_problems(config: RunConfig) -> list[str]:
    problems = []
    for source in (config.teacher, config.student):
        if source.model:
            reads_weights = not (isinstance(source, StudentConfig) and source.from_config is not None)
            problems += _faults_of(check_weights if reads_weights else resolve_source, source)
        if source.tokenizer:
            problems += _faults_of(resolve_tokenizer, source)
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = _faults_of(refuse_unused, data)
    for name, source, _ in data.sources():
        problems += _faults_of(check_source, source.source, name if isinstance(data.train, str) else f"{name}.source")
    if data.eval is not None:
        problems += _faults_of(check_source, data.eval, "data.eval")
    return problems


def _output_problems(folder: Path) -> list[str]:
    """What keeps the run from writing into `folder`.

    It is tried, since permissions say nothing to root nor of file systems like /proc.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            return [f"log.output_dir: {folder} cannot be made, {existing} is a file; choose another folder"]
        with tempfile.TemporaryDirectory(dir=existing, prefix=".kd_plugin-") as trial:
            (Path(trial) / folder.absolute().relative_to(existing.absolute())).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or str(error)
        return [f"log.output_dir: {folder} cannot be written ({reason}); choose another folder"]
    return []


def layout_problems(config: RunConfig, mode: str | None, world_size: int | None) -> list[str]:
    """One line for each setting that cannot spread the models as it says, under the resolved `mode` if it is known."""
    return [*quantised_layout_problems(config, mode, world_size), *_group_problems(config, mode, world_size)]


def _group_problems(config: RunConfig, mode: str | None, world_size: int | None) -> list[str]:
    size = config.train.shard_size
    if _wants_deepspeed(config, mode):
        return _deepspeed_layout_problems(config)
    if size == 1 and (mode or config.train.parallel) == "fsdp1":
        return [
            "train.shard_size is 1, which FSDP1 takes for one process and reduces nothing: set train.parallel to ddp"
        ]
    if size is None or mode == "single" or world_size is None or world_size % size == 0:
        return []
    divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
    return [f"train.shard_size is {size}, wanted a divisor of the {world_size} ranks: set it to {divisors} or null"]


def _deepspeed_layout_problems(config: RunConfig) -> list[str]:
    problems, size = [], config.train.shard_size
    if size is not None:
        problems.append(
            f"train.shard_size is {size}, which is FSDP's: remove it, and set "
            "deepspeed.zero_optimization.zero_hpz_partition_size to gather within groups of ranks"
        )
    if config.teacher.offload and config.teacher.sharding == "replicate":
        problems.append(
            "teacher.offload is true, which is ZeRO-3's work under deepspeed, but teacher.sharding is replicate: "
            "set teacher.sharding to shard, or teacher.offload to false"
        )
    return problems


def _compile_problems(config: RunConfig, mode: str | None) -> list[str]:
    if not (config.train.compile and _wants_deepspeed(config, mode) and zero_block.zero_stage(config.deepspeed) == 3):
        return []
    return [
        "train.compile is true, but ZeRO-3 gathers weights inside of each layer, which breaks its graph at each: "
        "set train.parallel to fsdp, deepspeed.zero_optimization.stage to 2 or less, or train.compile to false"
    ]


def _wants_deepspeed(config: RunConfig, mode: str | None) -> bool:
    return mode == "deepspeed" or (mode is None and config.train.parallel == "deepspeed")


def _deepspeed_problems(
    config: RunConfig, mode: str | None, world_size: int | None, accumulation: int | None
) -> list[str]:
    wanted = _wants_deepspeed(config, mode)
    problems = []
    if wanted and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            "train.parallel is deepspeed, which is not installed: "
            "pip install --no-build-isolation 'kd-plugin[deepspeed]'"
        )
    if wanted or (mode is None and config.train.parallel == "auto" and config.deepspeed is not None):
        conflicts = zero_block.conflicts(config, world_size=world_size, accumulation=accumulation)
        problems += [f"{conflict}; change or remove the key, or write auto" for conflict in conflicts]
    return problems


def _idle_sources(config: RunConfig) -> Idle:
    student = config.student
    if not config.distill.soft_weight:
        if student.model:
            yield "teacher", "distill.soft_weight is 0"
        else:
            keys = ["quantization", "micro_batch_size", "input"]
            yield from _each_changed(config.teacher, keys, "distill.soft_weight is 0")
    for source in (config.teacher, student):
        name = source.tokenizer or source.model
        if source.revision and source.model and is_local(source.model) and is_local(str(name)):
            yield f"{section_name(source)}.revision", f"{source.model} is on this machine, not on the hub"
    if student.model is None:
        yield from _idle_of_built_student(student)
    elif student.from_config is not None and student.allow_pickle:
        yield "student.allow_pickle", "with student.from_config no weights of student.model are read"


def _idle_of_built_student(student: StudentConfig) -> Idle:
    why = f"student.{'from_teacher' if student.from_teacher else 'from_config'} reads no files of a student"
    keys = ["gguf_file", "allow_pickle"]
    if not student.tokenizer:  # which they would be about
        keys.append("revision")
        if student.from_teacher:
            keys.append("trust_remote_code")
    yield from _each_changed(student, keys, why)


def _idle_data(data: DataConfig) -> Idle:
    sources = [*(source.source for _, source, _ in data.sources()), *([data.eval] if data.eval else [])]
    if all(source == "python_docs" or source.endswith((".txt", ".txt.gz")) for source in sources):
        yield from _each_changed(
            data, ["text_column", "columns", "train_on"], f"{' and '.join(sources)} have no columns"
        )
    for other in ("eval", "eval_split"):
        if getattr(data, other) is not None:
            yield from _each_changed(data, ["eval_fraction"], f"data.{other} names the held-out text")
            break
    if data.eval and data.eval_split and not has_splits(data.eval):
        yield "data.eval_split", f"data.eval {data.eval} is a file, which has no splits"
    if data.streaming and data.max_documents is not None:
        yield "data.streaming", "with data.max_documents datasets of the hub are streamed in any case"


def _idle_objective(distill: DistillConfig) -> Idle:
    if distill.chunk_size != "auto":
        yield from _each_changed(distill, ["loss_memory_mb"], f"distill.chunk_size is {distill.chunk_size}")
    if not distill.soft_weight:
        soft = ["divergence", "terms", "temperature", "temperature_power", "soft_on", "beta", "alpha"]
        yield from _each_changed(distill, soft, "distill.soft_weight is 0")
        return
    yield from _idle_options(distill)
    terms = distill.terms or ()
    own = [term.temperature for term in terms]
    if terms and None not in own:
        yield from _each_changed(distill, ["temperature"], "each term has its own")
    if all((temperature or distill.temperature) == 1 for temperature in own or [None]):
        yield from _each_changed(distill, ["temperature_power"], "the temperature is 1")


def _idle_options(distill: DistillConfig) -> Idle:
    """Options of divergences (beta, alpha) that no divergence of the objective takes."""
    terms = distill.terms or ()
    for key, users in _USERS.items():
        takers = [term for term in terms if term.name in users]
        if not takers and (terms or distill.divergence not in users):
            yield from _each_changed(distill, [key], f"it belongs to {' and '.join(users)}")
        elif takers and all(getattr(term, key) is not None for term in takers):
            yield from _each_changed(distill, [key], "each term has its own")
        for index, term in enumerate(terms):
            if term.name not in users and getattr(term, key) is not None:
                yield f"distill.terms.{index}.{key}", f"it belongs to {' and '.join(users)}, not to {term.name}"


_USERS = {option: [name for name, about in BUILT_IN.items() if option in about.options] for option in ("beta", "alpha")}


def _idle_run(config: RunConfig) -> Idle:
    train = config.train
    if train.stop_on is not None and not train.eval_every:
        yield "train.stop_on", "train.eval_every is 0, so that the only evaluation after a step is the last"
    if not train.export or not train.eval_every:
        why = "train.eval_every is 0, so that the last student is the only one evaluated"
        yield from _each_changed(train, ["export_best"], why if train.export else "train.export is false")
    if (config.deepspeed or {}).get("optimizer"):
        yield from _each_changed(train, ["optimizer"], "deepspeed.optimizer names another")
    if not train.save_every:
        yield from _each_changed(train, ["keep_checkpoints"], "train.save_every is 0")
    if train.schedule == "constant":
        yield from _each_changed(train, ["min_lr_ratio"], "the schedule is constant")
    if not config.log.sample_prompt:
        yield from _each_changed(config.log, ["sample_tokens"], "log.sample_prompt is not set")


def _idle_layout(config: RunConfig, mode: str | None) -> Idle:
    mode = mode or config.train.parallel
    if config.deepspeed is not None and mode not in ("auto", "deepspeed"):
        yield "deepspeed", f"train.parallel is {mode}"
    if mode == "single":
        yield from _each_changed(config.distill, ["exchange"], "one process exchanges nothing")
        if config.teacher.quantization is None:  # which wants it on several ranks
            yield from _each_changed(config.teacher, ["sharding"], "one process shards nothing")
        yield from _each_changed(config.train, ["shard_size"], "one process shards nothing")
    if mode == "ddp" and config.teacher.sharding == "replicate":
        yield from _each_changed(config.train, ["shard_size"], "train.parallel ddp and teacher.sharding replicate")


def _each_changed(section: BaseModel, keys: list[str], why: str) -> Idle:
    name = type(section).__name__.removesuffix("Config").lower()  # DataConfig is the section data
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{name}.{key}", why
