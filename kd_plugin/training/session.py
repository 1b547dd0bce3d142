"""What a run holds while it lasts, and how it is put together: attach, shard, open what is written to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kd_plugin.data.packing import Batch, Sequences, TrainBatches, eval_batches
from kd_plugin.engines import zero_block
from kd_plugin.engines.compiled_layers import compile_layers
from kd_plugin.engines.process_group import Placement, share_timeout
from kd_plugin.engines.protocol import Engine
from kd_plugin.plugin.attach import Plugin, attach
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import to_yaml
from kd_plugin.training import checkpoint
from kd_plugin.training.ahead import TeacherPace
from kd_plugin.training.best import Best, EarlyStop
from kd_plugin.training.schedule import micro_batches_together
from kd_plugin.training.tensorboard import Writer
from kd_plugin.training.writers import open_writers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Material", "Session", "make_session"]

logger = logging.getLogger(__name__)


class Material(NamedTuple):
    """What is loaded before anything is sharded."""

    tokenizer: PreTrainedTokenizerBase
    datasets: tuple[Sequences, Sequences]
    """Training and held-out sequences."""
    teacher: PreTrainedModel
    student: PreTrainedModel


@dataclass
class Session:
    """Everything that a run holds while it lasts."""

    config: RunConfig
    place: Placement
    mode: str
    """`train.parallel`, resolved."""
    engine: Engine
    plugin: Plugin
    pace: TeacherPace
    batches: TrainBatches
    held_out: Callable[[], Iterator[Batch]]
    """Begins the micro-batches of one evaluation anew."""
    num_held_out: int
    """Of them, on each rank."""
    writer: Writer
    best: Best
    early_stop: EarlyStop
    history: list[dict[str, float]] = field(default_factory=list)
    """The numbers of each logged step, with "step"."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the run has done -> wall time."""
    memory: dict[str, float] = field(default_factory=dict)
    """Peak memory in GiB, of the largest rank, as last measured."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the student in eval mode in the body, and in training mode after it."""
        self.engine.student.eval()
        try:
            yield
        finally:
            self.engine.student.train()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the body to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def make_session(
    config: RunConfig,
    place: Placement,
    mode: str,
    accumulation: int,
    material: Material,
    start_from: Path | None,
) -> Session:
    """Attach the teacher, spread both models over the ranks, and open what the run writes to.

    `mode` is `train.parallel`, resolved, and `accumulation` the micro-batches per rank and step; `start_from` is the
    checkpoint that the run continues from, if there is one.
    """
    plugin = attach(material.student, material.teacher, config.distill)
    if config.train.activation_checkpointing:
        _checkpoint_activations(material.student)
    if config.train.compile:
        _compile_layers(config, place, mode, material)
    engine = _engine(config, place, mode, accumulation, material)
    if place.owns_group:
        share_timeout(config.train.process_group_timeout_s)
    plugin.teacher = engine.teacher
    for note in engine.applied_notes:
        logger.info("%s", note)
    dataset, held_out = material.datasets
    done = checkpoint.step_of(start_from) if start_from else None
    return Session(
        config=config,
        place=place,
        mode=mode,
        engine=engine,
        plugin=plugin,
        pace=TeacherPace(plugin, _together(config, place, start_from)),
        batches=_train_batches(config, place, accumulation, dataset),
        held_out=_held_out(config, place, held_out),
        num_held_out=_num_held_out(config, place, held_out),
        writer=_open_writer(config, place, done),
        best=Best(config, done=done),
        early_stop=EarlyStop(config, done=done),
    )


def _together(config: RunConfig, place: Placement, start_from: Path | None) -> int | None:
    """Micro-batches at once that the configuration gives, or the checkpoint that the run continues from."""
    together = micro_batches_together(config)
    if together is None and start_from is not None:
        return checkpoint.together_in(start_from, config, place.world_size)
    return together


def _checkpoint_activations(student: PreTrainedModel) -> None:
    # Renamed in Transformers 5.2x; both take the arguments of torch.utils.checkpoint.
    old_name, new_name = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    name = new_name if hasattr(student, new_name) else old_name
    getattr(student, name)({"use_reentrant": False})


def _compile_layers(config: RunConfig, place: Placement, mode: str, material: Material) -> None:
    models = {"student": material.student, "teacher": material.teacher}
    if mode == "deepspeed" and zero_block.shards_teacher(config, place.world_size):
        del models["teacher"]
        logger.info("train.compile: the teacher runs eager under ZeRO-3, which gathers weights inside of its layers")
    compile_layers(models)


def _train_batches(config: RunConfig, place: Placement, accumulation: int, dataset: Sequences) -> TrainBatches:
    train = config.train
    batches = TrainBatches(
        dataset,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        seed=train.seed,
        rank=place.rank,
        world_size=place.world_size,
    )
    logger.info("%d steps read the training text %.2f times", train.max_steps, batches.epochs(train.max_steps))
    return batches


def _held_out(config: RunConfig, place: Placement, dataset: Sequences) -> Callable[[], Iterator[Batch]]:
    """A function that begins the micro-batches of one evaluation anew."""
    train = config.train
    return partial(
        eval_batches,
        dataset,
        num_sequences=train.eval_sequences or len(dataset),
        micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
        rank=place.rank,
        world_size=place.world_size,
    )


def _num_held_out(config: RunConfig, place: Placement, dataset: Sequences) -> int:
    """Micro-batches of one evaluation on each rank."""
    train = config.train
    sequences = min(train.eval_sequences or len(dataset), len(dataset))
    return -(-sequences // ((train.eval_micro_batch_size or train.micro_batch_size) * place.world_size))


def _open_writer(config: RunConfig, place: Placement, done: int | None) -> Writer:
    """Make the run's folder, and write its configuration there and to what the run reports to."""
    folder = Path(config.log.output_dir)
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    writer = open_writers(config, rank=place.rank, done=done)
    writer.text("config", f"```yaml\n{to_yaml(config)}\n```", done or 0)
    return writer


def _engine(config: RunConfig, place: Placement, mode: str, accumulation: int, material: Material) -> Engine:
    if mode == "deepspeed":
        from kd_plugin.engines.zero import DeepSpeedEngine

        return DeepSpeedEngine(material.student, material.teacher, config, place, accumulation)
    from kd_plugin.engines.fsdp import FsdpEngine
    from kd_plugin.engines.fsdp1 import Fsdp1Engine

    kind = Fsdp1Engine if mode == "fsdp1" else FsdpEngine
    return kind(material.student, material.teacher, config, place, mode)
