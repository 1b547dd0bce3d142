# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false
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
from typing import TYPE_CHECKING

import torch

from kd_plugin.data.documents import check_all_ids, load_datasets
from kd_plugin.data.teacher_text import teacher_reader_of
from kd_plugin.engines.process_group import Placement, start_process_group
from kd_plugin.engines.protocol import DTYPES
from kd_plugin.models.loading import build_student, check_positions, load_teacher, progress_bars
from kd_plugin.models.quantization import quantization_method
from kd_plugin.plugin.tokenizers import check_vocabulary
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.console import run_log
from kd_plugin.training.export import ADAPTER, export_student
from kd_plugin.training.finite import check_weights
from kd_plugin.training.isolation import isolate_documents
from kd_plugin.training.loop import evaluate, run_steps
from kd_plugin.training.metrics_file import first_evaluation
from kd_plugin.training.model_card import adapter_card, model_card
from kd_plugin.training.precision import settled_precision
from kd_plugin.training.preflight import SetupError, early_problems, idle_settings
from kd_plugin.training.preflight_quantization import quantised_layout_problems
from kd_plugin.training.report import continuations, diverged, report
from kd_plugin.training.schedule import accumulation_steps, parallel_mode, seed_everything, with_steps
from kd_plugin.training.session import Material, Session, make_session
from kd_plugin.training.tensorboard import sample_tag, verbatim
from kd_plugin.training.tokenizers import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """Evaluation before step 1, also where the run was resumed."""
    after: dict[str, float]
    """Evaluation after the last step."""
    output_dir: Path
    export_dir: Path | None
    """The student as a Transformers folder; None with train.export=false."""


def train(config: RunConfig) -> TrainResult:
    """Distil as `config` says, under whatever launcher started this process. All ranks call this.

    Raises:
        ValueError: a setting, a model or the data does not fit, or the student's numbers stopped being numbers; the
            message says what to change.
    """
    if not isinstance(config, RunConfig):
        path = repr(str(config)) if isinstance(config, str | Path) else "PATH"
        kind = type(config).__name__
        raise TrainError(f"kd.train wants a RunConfig, found {kind}: kd.train(kd.load_config({path}))")
    place = start_process_group(config.train.process_group_timeout_s)
    try:
        with run_log(place.rank), progress_bars(place.rank == 0 and sys.stderr.isatty()):
            mode = parallel_mode(config, place.world_size)
            with _backend(mode):
                return _train(config, place, mode)
    finally:
        place.close()


def _backend(mode: str) -> AbstractContextManager[None]:
    """A context that sets what the backend of `mode` needs in this process while the run lasts."""
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
    per_step = config.train.micro_batch_size * accumulation * place.world_size
    config = with_steps(config, num_sequences=len(material.datasets[0]), sequences_per_step=per_step)
    build = partial(type(material.student), copy.deepcopy(material.student.config))
    session = make_session(config, place, mode, accumulation, material, start_from)
    session.seconds["load"] = time.perf_counter() - start
    with session.writer:
        if config.data.packing == "isolated":
            with session.timed("packing"):
                isolate_documents(session)
        done = _resume(session, start_from)
        now = evaluate(session, done)
        before = first_evaluation(Path(config.log.output_dir)) or now if done else now
        after = now if session.early_stop.is_over else run_steps(session, done + 1, now)
        last = int(session.history[-1]["step"]) if session.history else done
        step = session.best.restore(session.engine, last)
        after = after if step == last else session.best.values
        return _finish(session, material, build, before, after, step)


def _load(config: RunConfig, place: Placement) -> Material:
    tokenizer = tokenizer_of(config)
    distill = config.distill
    datasets = load_datasets(
        config.data,
        tokenizer,
        distill.ignore_index,
        seed=config.train.seed,
        soft_on_all=distill.soft_everywhere,
        teacher=teacher_reader_of(config, tokenizer),
    )
    teacher, student = _models(config, place)
    mode, found = parallel_mode(config, place.world_size), quantization_method(teacher)
    if problems := quantised_layout_problems(config, mode, place.world_size, found=found):
        raise SetupError("\n".join(problems))
    embedded = {}
    for name, model in (("teacher", teacher), ("student", student)):
        embedded[name] = check_vocabulary(model, tokenizer, role=name)
        check_positions(model, config.data.seq_len, role=name)
        check_weights(model, name, _source_of(config, name))
        logger.info("%s: %s, %.1fM parameters", name, type(model).__name__, model.num_parameters() / 1e6)
    check_all_ids(config, tokenizer, datasets, embedded)
    seed_everything(config.train.seed + place.rank)  # dropout differs by rank, weights are there already
    return Material(tokenizer, datasets, teacher, student)


def _models(config: RunConfig, place: Placement) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student; one that is cut from a teacher that is quantised here gets the weights of its files."""
    seed = config.train.seed
    if config.teacher.quantization is None or config.student.from_teacher is None:
        teacher = load_teacher(config.teacher, place.device)
        return teacher, build_student(config.student, teacher, seed=seed)
    whole = config.teacher.model_copy(update={"quantization": None})
    student = build_student(config.student, load_teacher(whole), seed=seed)
    return load_teacher(config.teacher, place.device), student


def _source_of(config: RunConfig, role: str) -> str:
    """Where the weights of the student or the teacher come from, for messages."""
    student = config.student
    of_teacher = role == "teacher" or student.from_teacher is not None or not student.model
    return config.teacher.model if of_teacher else str(student.model)


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


def _resume(session: Session, folder: Path | None) -> int:
    """Continue from the checkpoint in `folder`, if there is one; returns the steps that are done."""
    if folder is None:
        return 0
    run = checkpoint.resume(session.engine, session.config, folder, mode=session.mode)
    if rows := checkpoint.automatic_chunk(run, session.config):
        session.plugin.agreed_chunk.continue_with(rows)
    logger.info("resumed %s", folder)
    return run["step"]


def _finish(
    session: Session,
    material: Material,
    build: Callable[[], PreTrainedModel],
    before: dict[str, float],
    after: dict[str, float],
    step: int,
) -> TrainResult:
    """Export the student, sample from both models and report; a student that has diverged is an error instead."""
    config = session.config
    folder = Path(config.log.output_dir)
    failure = diverged(session.history, after)
    export = folder / "export" if config.train.export and not failure else None
    with session.timed("export"):
        if export:
            export_student(
                session.engine,
                partial(_plain_student, build, material),
                material.tokenizer,
                export,
                dtype=DTYPES[config.student.dtype],
                card=model_card(config, before, after, step=step),
                adapted=config.student if config.student.lora else None,
                adapter_card=adapter_card(config),
            )
    with session.timed("samples"):
        samples = {} if failure else _samples(session, material, step)
    if session.place.rank == 0:
        _report(session, step, {"before": before, "after": after}, samples, export)
    if failure:
        raise TrainError(failure)
    return TrainResult(step, session.history, before, after, folder, export)


def _report(
    session: Session, step: int, quality: dict[str, dict[str, float]], samples: dict[str, str], export: Path | None
) -> None:
    """Write summary.json and show the table; `quality` has the evaluations `before` and `after`.

    The summary of a run that was at its end already stays as it is: this start has trained nothing.
    """
    folder = Path(session.config.log.output_dir)
    places = {"config": folder / "config.yaml", "metrics": folder / "metrics.jsonl"}
    if session.config.log.tensorboard:
        places["TensorBoard"] = folder
    if export:
        places["export"] = export
        if (export / ADAPTER).is_dir():
            places["adapter"] = export / ADAPTER
    summary = {**quality, "seconds": session.seconds, "memory": session.memory}
    path = folder / "summary.json"
    if session.history or not path.exists():
        path.write_text(json.dumps({"step": step, **summary, "samples": samples}, indent=1))
    else:
        logger.info("train.resume: the run was at its end already, nothing was trained; %s stays as it was", path)
    logger.info("%s", report(**summary, history=session.history, samples=samples, places=places))


def _plain_student(build: Callable[[], PreTrainedModel], material: Material) -> PreTrainedModel:
    model = build()
    model.generation_config = material.student.generation_config
    return model


def _samples(session: Session, material: Material, step: int) -> dict[str, str]:
    """Continuations by teacher and student. Sharded models gather in step, so all ranks come here."""
    log, engine = session.config.log, session.engine
    if not log.sample_prompt:
        return {}
    engine.student.eval()
    models = {"teacher": engine.teacher, "student": engine.student}
    with torch.compiler.set_stance("force_eager"):  # for a few tokens, with a cache of keys in every layer
        samples = continuations(models, material.tokenizer, log.sample_prompt, log.sample_tokens)
    for name, text in samples.items():
        session.writer.text(sample_tag(name), verbatim(text), step)
    return {"prompt": log.sample_prompt, **samples}
