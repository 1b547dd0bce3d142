"""What is estimated: two models, and how one run spreads them over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kd_plugin.distributed.layout import chunk_length
from kd_plugin.divergences.objective import make_objective
from kd_plugin.engines.protocol import DTYPES
from kd_plugin.estimate.quantization import Packed, packed_as
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.loss.chunk_size import teacher_columns
from kd_plugin.settings.distill import ExchangeMode
from kd_plugin.settings.run import DistillConfig, RunConfig

# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py)
_MAX_LIVE, _REDUCE_BUCKET, _PERSISTENCE = 10**9, 5 * 10**8, 10**5
_FLOAT = 4  # bytes


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
    """None where `soft_weight` is 0: the loss never asks the teacher."""
    config: RunConfig
    mode: str
    """single, ddp, fsdp (FSDP2), fsdp1, zero0, zero1, zero2 or zero3."""
    teacher_sharded: bool
    world_size: int
    shard_ranks: int
    """Ranks that one copy of a model is cut over by FSDP; fewer than all of them under HSDP."""
    exchange: ExchangeMode
    rows: int
    """Rows n in the loss, per rank and micro-batch."""
    chunk: int
    """Rows C of one chunk."""
    accumulation: int
    together: int
    """Micro-batches of a rank that the teacher reads at once, at most."""
    device: str
    """cuda or cpu."""
    gpu: str
    """The GPU, as `settings.device_peaks` has it."""

    @property
    def distill(self) -> DistillConfig:
        """The settings of the objective."""
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
    def teacher_columns(self) -> int:
        """Token ids of the teacher that the loss reads; 0 without a teacher."""
        if self.teacher is None:
            return 0
        return teacher_columns(make_objective(self.distill), self.student.vocab_size, self.teacher.vocab_size)

    @property
    def unequal(self) -> bool:
        """Whether the student has token ids that the teacher lacks."""
        return self.teacher is not None and self.teacher.vocab_size < self.student.vocab_size

    @property
    def slice_size(self) -> int:
        """Token ids of the student's head in the largest vocabulary slice of a rank."""
        return chunk_length(self.student.vocab_size, self.exchange_ranks)

    @property
    def teacher_slice_size(self) -> int:
        """Token ids of the teacher's head in that slice: it is cut at the student's boundaries."""
        return min(self.slice_size, self.teacher_columns)

    @property
    def exchange_ranks(self) -> int:
        """Ranks that exchange for the heads: those that share a copy; all under FSDP1, which does not tell them."""
        return self.world_size if self.mode == "fsdp1" else self.group_ranks

    @property
    def group_ranks(self) -> int:
        """Ranks that share one copy of the student and gather its parameters."""
        return self.shard_ranks if self.is_fsdp else self.world_size

    @property
    def copies(self) -> int:
        """Groups of ranks that exchange gradients only; 1 without HSDP."""
        return self.world_size // self.group_ranks

    @property
    def teacher_ranks(self) -> int:
        """Ranks that one copy of the teacher is cut over."""
        if not self.teacher_sharded:
            return 1
        return self.world_size if self.is_zero else self.shard_ranks

    @property
    def teacher_streamed(self) -> bool:
        """Whether the teacher's parameters wait in host memory; a CPU has no other."""
        return self.config.teacher.offload and self.device == "cuda"

    @property
    def teacher_gathered(self) -> bool:
        """Whether the teacher's layers are made whole one by one, from other ranks or from host memory."""
        return self.teacher_sharded or self.config.teacher.offload

    @property
    def teacher_slice_held(self) -> bool:
        """Whether a rank's FSDP2 shard of the teacher's head is its vocabulary slice; else it keeps a copy of that."""
        teacher, ranks = self.teacher, self.group_ranks
        if teacher is None or self.mode != "fsdp" or not self.teacher_sharded or self.teacher_streamed or teacher.tied:
            return False
        return chunk_length(teacher.vocab_size, ranks) == chunk_length(self.student.vocab_size, ranks)

    @property
    def sorts(self) -> bool:
        """Whether the objective sorts the vocabulary (uld): all of both models' token ids count."""
        return make_objective(self.distill).sorts

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the student."""
        return self.mode.startswith("zero")

    @property
    def is_fsdp(self) -> bool:
        """Whether FSDP2 or FSDP1 cuts the student."""
        return self.mode in ("fsdp", "fsdp1")

    @property
    def gathers_student(self) -> bool:
        """Whether the student's parameters are cut over the ranks."""
        return (self.is_fsdp or self.mode == "zero3") and self.world_size > 1

    @property
    def student_head_is_cut(self) -> bool:
        """Whether `stats` leaves the student's head cut: FSDP2 does, unless the embedding gathers it anyway."""
        return self.mode == "fsdp" and not self.student.tied

    def zero_option(self, name: str, default: int) -> int:
        """The size `name` of the `deepspeed:` block, in elements; `default` where it gives no number."""
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
        """Elements of the largest parameter that ZeRO-3 leaves whole."""
        return self.zero_option("stage3_param_persistence_threshold", _PERSISTENCE)

    def spread(
        self, *, mode: str, teacher_sharded: bool, exchange: ExchangeMode = "weight", shard_ranks: int | None = None
    ) -> Setup:
        """This run with its models spread over the ranks in another way."""
        ranks = self.shard_ranks if shard_ranks is None else shard_ranks
        return replace(self, mode=mode, teacher_sharded=teacher_sharded, exchange=exchange, shard_ranks=ranks)


def frozen_item(setup: Setup) -> int:
    """Bytes of one element of the student's frozen weights, as they are kept."""
    narrow = setup.is_zero or (setup.config.student.lora is not None and setup.mode != "fsdp1")
    return setup.student_item if narrow else _FLOAT


def teacher_forwards(setup: Setup) -> int:
    """Forwards of the teacher per rank and optimizer step."""
    return -(-setup.accumulation // setup.together)


def keeps_student_head(setup: Setup) -> bool:
    """Whether exchange `weight` gathers the student's frozen head once per step: FSDP2's, in a unit of its own."""
    learns = any(unit.name == "head" for unit in setup.student.learning)  # itself, or an adapter on it
    return runs_ahead(setup) and setup.gathers_student and setup.student_head_is_cut and not learns


def runs_ahead(setup: Setup) -> bool:
    """Whether the teacher reads several micro-batches of a step at once."""
    return setup.teacher is not None and teacher_forwards(setup) < setup.accumulation


def teacher_packed(setup: Setup) -> Packed | None:
    """How the teacher's weights are quantised, by `teacher.quantization` or its checkpoint; None: they are not."""
    if setup.teacher is None:
        return None
    quantization = setup.config.teacher.quantization
    quantization = setup.teacher.quantization if quantization is None else quantization
    return None if quantization is None else packed_as(quantization)


def has_8_bit_states(setup: Setup) -> bool:
    """Whether the optimizer keeps its states in 8 bits."""
    return setup.config.train.optimizer == "adamw_8bit" and not setup.is_zero
