"""What is estimated: two models, and how one run spreads them over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kd_plugin.chunks import rows_per_chunk
from kd_plugin.config import DistillConfig, RunConfig
from kd_plugin.engine import DTYPES, accumulation_steps, parallel_mode
from kd_plugin.estimate.meta import ModelSizes
from kd_plugin.parallel.zero import zero_stage

# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py)
_MAX_LIVE, _REDUCE_BUCKET, _PERSISTENCE = 10**9, 5 * 10**8, 10**5


class EstimateError(ValueError):
    """There is nothing to estimate as asked."""


class Line(NamedTuple):
    """One number with its reason."""

    name: str
    num_bytes: float
    how: str


@dataclass(frozen=True)
class Setup:
    """One run on `world_size` ranks. Bytes per element are those of the models' compute dtypes."""

    student: ModelSizes
    teacher: ModelSizes | None
    """None where `soft_weight` is 0: the loss never asks it."""
    config: RunConfig
    mode: str
    """single, ddp, fsdp, zero0, zero1, zero2 or zero3."""
    teacher_sharded: bool
    world_size: int
    exchange: str
    rows: int
    """Rows n in the loss, per rank and micro-batch."""
    chunk: int
    """Rows C of one chunk."""
    accumulation: int
    device: str
    """cuda or cpu."""

    @property
    def distill(self) -> DistillConfig:
        """The objective's section."""
        return self.config.distill

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.config.train.micro_batch_size * self.config.data.seq_len

    @property
    def student_item(self) -> int:
        """Bytes of one element in the student's compute dtype."""
        return DTYPES[self.config.student.dtype].itemsize

    @property
    def teacher_item(self) -> int:
        """Bytes of one element of the teacher."""
        return DTYPES[self.config.teacher.dtype].itemsize

    @property
    def shared_vocab(self) -> int:
        """Token ids in the loss."""
        sizes = [model.vocab_size for model in (self.student, self.teacher) if model is not None]
        return min(sizes)

    @property
    def shard_rows(self) -> int:
        """Most rows of a head on one rank, cut at the student's boundaries."""
        return min(-(-self.student.vocab_size // self.world_size), self.shared_vocab)

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the student."""
        return self.mode.startswith("zero")

    @property
    def gathers_student(self) -> bool:
        """Whether the student's parameters are cut over the ranks."""
        return self.mode in ("fsdp", "zero3") and self.world_size > 1

    @property
    def student_head_in_rows(self) -> bool:
        """Whether `stats` leaves the student's head cut: FSDP2 does, unless the embedding gathers it anyway."""
        return self.mode == "fsdp" and not self.student.tied

    def zero_option(self, name: str, default: int) -> int:
        """A size of the `deepspeed:` block, in elements."""
        block = (self.config.deepspeed or {}).get("zero_optimization") or {}
        value = block.get(name, default)
        return int(value) if isinstance(value, int | float) else default

    @property
    def max_live(self) -> int:
        """Elements that ZeRO-3 may keep gathered."""
        return self.zero_option("stage3_max_live_parameters", _MAX_LIVE)

    @property
    def reduce_bucket(self) -> int:
        """Elements of ZeRO's buffer for gradients."""
        return self.zero_option("reduce_bucket_size", _REDUCE_BUCKET)

    @property
    def persistence(self) -> int:
        """ZeRO-3 leaves parameters of at most so many elements whole."""
        return self.zero_option("stage3_param_persistence_threshold", _PERSISTENCE)

    def spread(self, *, mode: str, teacher_sharded: bool, exchange: str = "weight") -> Setup:
        """The same run spread otherwise."""
        return replace(self, mode=mode, teacher_sharded=teacher_sharded, exchange=exchange)


def make_setup(
    config: RunConfig, sizes: tuple[ModelSizes, ModelSizes], *, world_size: int, rows: int | None, device: str
) -> Setup:
    """`config` on `world_size` ranks; `rows` defaults to every token of a micro-batch.

    Raises:
        EstimateError: fewer than one rank or row, or more rows than tokens.
        EngineError: `train` does not fit `world_size`.
    """
    student, teacher = sizes
    tokens = config.train.micro_batch_size * config.data.seq_len
    rows = tokens if rows is None else rows
    if world_size < 1:
        raise EstimateError(f"--world-size is {world_size}: give the number of ranks, 1 or more")
    if not 1 <= rows <= tokens:
        raise EstimateError(
            f"--rows is {rows}, but a micro-batch has micro_batch_size {config.train.micro_batch_size} x seq_len "
            f"{config.data.seq_len} = {tokens} tokens: give 1 to {tokens}"
        )
    mode = parallel_mode(config, world_size)
    mode = f"zero{zero_stage(config.deepspeed)}" if mode == "deepspeed" else mode
    chunk = rows_per_chunk(config.distill.chunk_size, config.distill.loss_memory_mb, student.vocab_size)
    return Setup(
        student=student,
        teacher=teacher if config.distill.soft_weight else None,
        config=config,
        mode=mode,
        teacher_sharded=config.teacher.sharding == "shard" and world_size > 1,
        world_size=world_size,
        exchange="weight",  # until `wire.settled` has looked at the volumes
        rows=rows,
        chunk=min(chunk, rows),
        accumulation=accumulation_steps(config.train, seq_len=config.data.seq_len, world_size=world_size),
        device=device,
    )
