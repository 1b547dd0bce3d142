"""`kd.train(config)`: load, attach, shard, run the steps, export, report.

Notable decisions:
- what is cheap to get wrong is checked first: layout, tokenizers and data before any model is loaded;
- the teacher is attached before either model is sharded, so that every head is sharded as the plugin left it;
- the export is an ordinary Transformers folder in `student.dtype`, the precision in which the student ran.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kd_plugin.data.documents import PackedDataset, TrainBatches, check_all_ids, eval_batches, load_datasets
from kd_plugin.engines.process_group import Placement, share_timeout, start_process_group
from kd_plugin.engines.protocol import DTYPES, Engine
from kd_plugin.models.loading import build_student, check_positions, load_teacher, load_tokenizer, progress_bars
from kd_plugin.plugin.attach import attach
from kd_plugin.plugin.tokenizers import check_tokenizers, check_vocabulary
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import to_yaml
from kd_plugin.training import checkpoint
from kd_plugin.training.console import run_log
from kd_plugin.training.export import export_student
from kd_plugin.training.finite import check_weights
from kd_plugin.training.loop import Session, evaluate, run_steps
from kd_plugin.training.precision import settled_precision
from kd_plugin.training.preflight import SetupError, early_problems, idle_settings
from kd_plugin.training.report import continuations, diverged, report
from kd_plugin.training.schedule import accumulation_steps, parallel_mode, seed_everything
from kd_plugin.training.tensorboard import make_writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrainError", "TrainResult", "train"]

logger = logging.getLogger(__name__)


class TrainError(ValueError):
    """The run cannot go on as configured, or came to nothing."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind; the same on every rank."""

    step: int
    """Last optimizer step."""
    history: list[dict[str, float]]
    """The numbers of each logged step, with "step"."""
    before: dict[str, float]
    """Evaluation before the first step of this run."""
    after: dict[str, float]
    """Evaluation after the last step."""
    output_dir: Path
    export_dir: Path | None
    """The student as a Transformers folder; None with train.export=false."""


class _Material(NamedTuple):
    """What is loaded before anything is sharded."""

    tokenizer: PreTrainedTokenizerBase
    datasets: tuple[PackedDataset, PackedDataset]
    """Training and held-out sequences."""
    teacher: PreTrainedModel
    student: PreTrainedModel


def train(config: RunConfig) -> TrainResult:
    """Distil as configured, under whatever launcher started this process. All ranks call it.

    Raises:
        ValueError: a setting, a model or the data does not fit; the message says what to change.
    """
    if not isinstance(config, RunConfig):
        path = repr(str(config)) if isinstance(config, str | Path) else "PATH"
        found = type(config).__name__
        raise TrainError(f"kd.train wants a RunConfig, found {found}: kd.train(kd.load_config({path}))")
    place = start_process_group(config.train.process_group_timeout_s)
    try:
        with run_log(place.rank), progress_bars(place.rank == 0 and sys.stderr.isatty()):
            mode = parallel_mode(config, place.world_size)
            with _backend(mode):
                return _train(config, place, mode)
    finally:
        place.close()


def _backend(mode: str) -> AbstractContextManager[None]:
    """What the backend needs set in this process for as long as the run lasts."""
    if mode != "deepspeed":
        return nullcontext()
    from kd_plugin.engines.zero import deepspeed_settings

    return deepspeed_settings()


def _train(config: RunConfig, place: Placement, mode: str) -> TrainResult:
    config = settled_precision(config, place)
    accumulation = accumulation_steps(config.train, seq_len=config.data.seq_len, world_size=place.world_size)
    if problems := early_problems(config, mode=mode, world_size=place.world_size, accumulation=accumulation):
        raise SetupError("\n".join(problems))
    _announce(config, place, mode, accumulation)
    start_from = checkpoint.to_continue(config, place.world_size)
    start = time.perf_counter()
    material = _load(config, place)
    build = partial(type(material.student), copy.deepcopy(material.student.config))
    session = _session(config, place, mode, accumulation, material, start_from)
    session.seconds["load"] = time.perf_counter() - start
    with session.writer:
        done = _resume(session, start_from)
        before = evaluate(session, done)
        after = run_steps(session, done + 1, before)
        return _finish(session, material, build, before, after, max(done, config.train.max_steps))


def _load(config: RunConfig, place: Placement) -> _Material:
    tokenizer = load_tokenizer(config.teacher)
    pretrained = config.student.model and config.student.from_config is None
    if config.student.tokenizer or pretrained:
        teacher_tokenizer, tokenizer = tokenizer, load_tokenizer(config.student)
        check_tokenizers(tokenizer, teacher_tokenizer)
    datasets = load_datasets(config.data, tokenizer, config.distill.ignore_index)
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=config.train.seed)
    embedded = {}
    for name, model in (("teacher", teacher), ("student", student)):
        embedded[name] = check_vocabulary(model, tokenizer, role=name)
        check_positions(model, config.data.seq_len, role=name)
        check_weights(model, name, _source_of(config, name))
        logger.info("%s: %s, %.1fM parameters", name, type(model).__name__, model.num_parameters() / 1e6)
    check_all_ids(config, tokenizer, datasets, embedded)
    seed_everything(config.train.seed + place.rank)  # dropout differs by rank, weights are there already
    return _Material(tokenizer, datasets, teacher, student)


def _source_of(config: RunConfig, role: str) -> str:
    """Where the weights of the student or the teacher come from, for messages."""
    student = config.student
    of_teacher = role == "teacher" or student.from_teacher is not None or not student.model
    return config.teacher.model if of_teacher else str(student.model)


def _session(
    config: RunConfig,
    place: Placement,
    mode: str,
    accumulation: int,
    material: _Material,
    start_from: Path | None,
) -> Session:
    train, (dataset, held_out) = config.train, material.datasets
    plugin = attach(material.student, material.teacher, config.distill)
    if train.activation_checkpointing:
        # Renamed in Transformers 5.2x; both take the arguments of torch.utils.checkpoint.
        old_name, new_name = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        name = new_name if hasattr(material.student, new_name) else old_name
        getattr(material.student, name)({"use_reentrant": False})
    engine = _engine(config, place, mode, accumulation, material)
    if place.owns_group:
        share_timeout(train.process_group_timeout_s)
    plugin.teacher = engine.teacher
    for note in engine.applied_notes:
        logger.info("%s", note)
    ranks = {"rank": place.rank, "world_size": place.world_size}
    in_training = {"micro_batch_size": train.micro_batch_size, "gradient_accumulation_steps": accumulation}
    batches = TrainBatches(dataset, seed=train.seed, **in_training, **ranks)
    in_evaluation = {
        "micro_batch_size": train.eval_micro_batch_size or train.micro_batch_size,
        "num_sequences": train.eval_sequences or len(held_out),
    }
    logger.info("%d steps read the training text %.2f times", train.max_steps, batches.epochs(train.max_steps))
    folder = Path(config.log.output_dir)
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    first_step = int(start_from.name.removeprefix("step_")) + 1 if start_from else 0
    writer = make_writer(folder, enabled=config.log.tensorboard and place.rank == 0, first_step=first_step)
    writer.text("config", f"```yaml\n{to_yaml(config)}\n```")
    return Session(
        config=config,
        place=place,
        mode=mode,
        engine=engine,
        plugin=plugin,
        batches=batches,
        held_out=partial(eval_batches, held_out, **in_evaluation, **ranks),
        writer=writer,
    )


def _engine(config: RunConfig, place: Placement, mode: str, accumulation: int, material: _Material) -> Engine:
    if mode == "deepspeed":
        from kd_plugin.engines.zero import DeepSpeedEngine

        return DeepSpeedEngine(material.student, material.teacher, config, place, accumulation)
    from kd_plugin.engines.fsdp import FsdpEngine
    from kd_plugin.engines.fsdp1 import Fsdp1Engine

    kind = Fsdp1Engine if mode == "fsdp1" else FsdpEngine
    return kind(material.student, material.teacher, config, place, mode)


def _announce(config: RunConfig, place: Placement, mode: str, accumulation: int) -> None:
    """Say what was derived, and warn of every setting that does nothing in this run."""
    train = config.train
    tokens = train.micro_batch_size * accumulation * place.world_size * config.data.seq_len
    logger.info(
        "%s on %d x %s, %s; %d tokens per step = %d sequences x %d accumulation x %d ranks x %d tokens",
        *(mode, place.world_size, place.device.type, config.student.dtype, tokens),
        *(train.micro_batch_size, accumulation, place.world_size, config.data.seq_len),
    )
    for line in idle_settings(config, mode):
        logger.warning("%s", line)
    if train.warmup_steps > train.max_steps:
        logger.warning("train.warmup_steps %d: the peak rate is never reached", train.warmup_steps)


def _resume(session: Session, folder: Path | None) -> int:
    if folder is None:
        return 0
    step = checkpoint.resume(session.engine, session.config, folder, mode=session.mode)
    logger.info("resumed %s", folder)
    return step


def _finish(
    session: Session,
    material: _Material,
    build: Callable[[], PreTrainedModel],
    before: dict[str, float],
    after: dict[str, float],
    step: int,
) -> TrainResult:
    config = session.config
    folder = Path(config.log.output_dir)
    failure = diverged(session.history, after)
    export = folder / "export" if config.train.export and not failure else None
    with session.timed("export"):
        if export:
            dtype = DTYPES[config.student.dtype]
            fresh = partial(_plain_student, build, material)
            export_student(session.engine, fresh, material.tokenizer, export, dtype=dtype)
    with session.timed("samples"):
        samples = {} if failure else _samples(session, material)
    if session.place.rank == 0:
        places = {"config": folder / "config.yaml"}
        if config.log.tensorboard:
            places["TensorBoard"] = folder
        if export:
            places["export"] = export
        summary = {"before": before, "after": after, "seconds": session.seconds, "memory": session.memory}
        (folder / "summary.json").write_text(json.dumps({"step": step, **summary, "samples": samples}, indent=1))
        text = report(**summary, history=session.history, samples=samples, places=places)
        logger.info("%s", text)
    if failure:
        raise TrainError(failure)
    return TrainResult(step, session.history, before, after, folder, export)


def _plain_student(build: Callable[[], PreTrainedModel], material: _Material) -> PreTrainedModel:
    model = build()
    model.generation_config = material.student.generation_config
    return model


def _samples(session: Session, material: _Material) -> dict[str, str]:
    """Continuations by teacher and student. Sharded models gather in step, so all ranks come here."""
    log, engine = session.config.log, session.engine
    if not log.sample_prompt:
        return {}
    engine.student.eval()
    models = {"teacher": engine.teacher, "student": engine.student}
    samples = continuations(models, material.tokenizer, log.sample_prompt, log.sample_tokens)
    for name, text in samples.items():
        session.writer.text(f"sample/{name}", text)
    return {"prompt": log.sample_prompt, **samples}
