"""How a run of a configuration spreads over its ranks, with nothing left on `auto` but the exchange."""

from __future__ import annotations

from dataclasses import replace

from kd_plugin.engines.protocol import DTYPES
from kd_plugin.engines.zero_block import zero_stage
from kd_plugin.estimate.setup import EstimateError, Setup
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.estimate.speeds import Speeds, speeds_of_gpu
from kd_plugin.loss.chunk_size import rows_on_gpu, rows_per_chunk
from kd_plugin.loss.device_speed import Speed, speed_by_peaks
from kd_plugin.settings.device_peaks import PEAKS, Peaks, peaks_of
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import layout_problems
from kd_plugin.training.schedule import accumulation_steps, micro_batches_together, parallel_mode

_PLENTY = 2**60  # bytes


def make_setup(
    config: RunConfig,
    sizes: tuple[ModelSizes, ModelSizes],
    *,
    world_size: int,
    rows: int | None,
    device: str,
    gpu: str,
) -> Setup:
    """Describe how a run of `config` spreads over `world_size` ranks.

    Args:
        config: the run, without `dtype: auto`.
        sizes: student and teacher.
        world_size: number of ranks.
        rows: rows in the loss per rank and micro-batch; None for every token of a micro-batch.
        device: `cuda` or `cpu`.
        gpu: the GPU, by a name of `settings.device_peaks`.

    Raises:
        EstimateError: fewer than one rank or row, more rows than tokens, groups that do not divide the ranks, or an
            unknown GPU.
        EngineError: `train` does not fit `world_size`.
    """
    rows = _rows(config, rows)
    mode, shard_ranks = _layout(config, world_size)
    accumulation = accumulation_steps(config.train, seq_len=config.data.seq_len, world_size=world_size)
    setup = Setup(
        student=sizes[0],
        teacher=sizes[1] if config.distill.soft_weight else None,
        config=config,
        mode=mode,
        teacher_sharded=config.teacher.sharding == "shard" and shard_ranks > 1,
        world_size=world_size,
        shard_ranks=shard_ranks,
        exchange="weight",  # until `wire.settled` has looked at the volumes
        rows=rows,
        chunk=rows,
        accumulation=accumulation,
        together=micro_batches_together(config) or accumulation,  # until `account` has looked at the memory
        device=device,
        gpu=gpu,
    )
    return replace(setup, chunk=min(chunk_rows(setup, config.distill.chunk_size), rows))


def _rows(config: RunConfig, rows: int | None) -> int:
    tokens = config.train.micro_batch_size * config.data.seq_len
    if rows is None:
        return tokens
    if not 1 <= rows <= tokens:
        raise EstimateError(
            f"--rows is {rows}, but a micro-batch has micro_batch_size {config.train.micro_batch_size} x seq_len "
            f"{config.data.seq_len} = {tokens} tokens: give 1 to {tokens}"
        )
    return rows


def _layout(config: RunConfig, world_size: int) -> tuple[str, int]:
    """`Setup.mode` and `Setup.shard_ranks` of the run."""
    if world_size < 1:
        raise EstimateError(f"--world-size is {world_size}: give the number of ranks, 1 or more")
    mode = parallel_mode(config, world_size)
    if problems := layout_problems(config, mode, world_size):
        raise EstimateError("\n".join(problems))
    if mode == "deepspeed":
        return f"zero{zero_stage(config.deepspeed)}", world_size
    shard_ranks = world_size if mode == "single" else config.train.shard_size or world_size
    if mode == "fsdp" and shard_ranks < min(2, world_size):
        mode = "ddp"  # the same layout
    return mode, shard_ranks


def chunk_rows(setup: Setup, chunk_size: int | str) -> int:
    """Rows of one chunk that `distill.chunk_size: chunk_size` comes to, as the plugin computes them.

    How much of a GPU's memory will be free then is not known here.
    """
    student, columns, memory = setup.student.vocab_size, setup.teacher_columns or None, setup.distill.loss_memory_mb
    if chunk_size != "auto" or setup.device == "cpu":
        return rows_per_chunk(chunk_size, memory, student, columns)
    return rows_on_gpu(gpu_speed(setup), _PLENTY, memory, student, columns).rows


def gpu_speed(setup: Setup) -> Speed:
    """How fast the GPU of `setup` multiplies for the student's loss."""
    return speed_by_peaks(_known_peaks(setup.gpu), DTYPES[setup.config.student.dtype])


def gpu_speeds(setup: Setup) -> Speeds:
    """How fast the GPU of `setup` does each kind of work, by the table of peaks."""
    return speeds_of_gpu(setup, _known_peaks(setup.gpu))


def _known_peaks(gpu: str) -> Peaks:
    if (peaks := peaks_of(gpu)) is None:
        raise EstimateError(f"--gpu {gpu} is not known here: give one of {', '.join(PEAKS)}")
    return peaks
