"""How many rows a chunk has, by `distill.chunk_size`, `distill.loss_memory_mb` and the device.

On a GPU, `auto` is as many rows as the products need: each chunk reads and writes the fp32 gradient of the head's
weight once, 8 D V bytes, for a product of 2 C D V FLOP. From C = 4 F / B rows on (F FLOP/s, B bytes/s) the product
takes longer than the memory, and more rows would gain nothing. On a CPU the memory decides, 512 MiB if nothing is said.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from kd_plugin.divergences.objective import Objective, make_objective
from kd_plugin.loss.device_speed import Speed, free_bytes, speed_of
from kd_plugin.settings.run import DistillConfig

_MIB = 2**20
_BYTES_PER_LOGIT = 4  # fp32
ON_CPU_MIB = 512.0
"""What `loss_memory_mb: null` is on a CPU."""
_MULTIPLE = 128
"""Rows of a tile of the products on a GPU."""
_SHARE_OF_FREE = 0.25
"""Of the free memory, for the chunk's logits: gradients and the optimizer's state may still be to come."""


class ChunkSize(NamedTuple):
    """Rows of one chunk, and what decided that."""

    rows: int
    reason: str


def rows_per_chunk(
    chunk_size: int | str, loss_memory_mb: float | None, vocab_size: int, teacher_vocab_size: int | None = None
) -> int:
    """Rows C of one chunk: `chunk_size`, or the most for which 8 * C * V bytes fit `loss_memory_mb` MiB (null: 512).

    From 64 rows on, the automatic value is a multiple of 64. Where the teacher's rows have another number of logits
    than the student's, `teacher_vocab_size` V', it is 4 * C * (V + V') bytes. Raises `ValueError` if not even one row
    fits.
    """
    if chunk_size != "auto":
        return int(chunk_size)
    loss_memory_mb = loss_memory_mb or ON_CPU_MIB
    row_bytes = _row_bytes(vocab_size, teacher_vocab_size)
    rows = int(loss_memory_mb * _MIB) // row_bytes
    if rows < 1:
        enough = 1.006 * row_bytes / _MIB  # three digits of it are never too few
        raise ValueError(
            f"loss_memory_mb={loss_memory_mb:g} does not hold one row of {vocab_size} logits; "
            f"one row needs {enough:.3g} MiB: raise loss_memory_mb"
        )
    return _whole_multiple(rows)


def rows_by_speed(speed: Speed) -> int:
    """Rows from which on a chunk's products, not its memory, take the time; a multiple of 128."""
    return _MULTIPLE * math.ceil(4 * speed.flops / speed.memory / _MULTIPLE)


def rows_on_gpu(
    speed: Speed, free: int, loss_memory_mb: float | None, vocab_size: int, teacher_vocab_size: int | None = None
) -> ChunkSize:
    """Rows C of one chunk on a GPU: those that its speed wants, or what free memory or `loss_memory_mb` holds of them.

    Args:
        speed: of the GPU.
        free: bytes that can still be allocated, of which the chunk's logits may take a quarter.
        loss_memory_mb: null: no other limit.
        vocab_size: logits of one row of the student.
        teacher_vocab_size: those of the teacher, where it has another number.

    Raises:
        ValueError: not even one row fits `loss_memory_mb`.
    """
    reason = f"the GPU's {speed.flops / 1e12:.3g} TFLOP/s at {speed.memory / 1e12:.3g} TB/s"
    sizes = [ChunkSize(rows_by_speed(speed), reason)]
    held = max(1, int(_SHARE_OF_FREE * free) // _row_bytes(vocab_size, teacher_vocab_size))
    sizes.append(ChunkSize(_whole_multiple(held), f"a quarter of the {free / 2**30:.1f} GiB of free memory"))
    if loss_memory_mb is not None:
        rows = rows_per_chunk("auto", loss_memory_mb, vocab_size, teacher_vocab_size)
        sizes.append(ChunkSize(rows, f"distill.loss_memory_mb {loss_memory_mb:g}"))
    return min(sizes, key=lambda size: size.rows)


def _whole_multiple(rows: int) -> int:
    return rows if rows < 64 else rows // 64 * 64


def _row_bytes(vocab_size: int, teacher_vocab_size: int | None) -> int:
    return _BYTES_PER_LOGIT * (vocab_size + (teacher_vocab_size or vocab_size))


def teacher_columns(objective: Objective, student_size: int, teacher_size: int) -> int:
    """Columns of the teacher's logits that the loss reads: those of the token ids that the student has; for uld all."""
    return teacher_size if objective.sorts else min(student_size, teacher_size)


def chunk_size_on(
    config: DistillConfig, student_size: int, teacher_size: int | None, device: torch.device, dtype: torch.dtype
) -> ChunkSize:
    """Rows of one chunk by `config` on `device`, and what decided that. No collective.

    Args:
        config: the objective.
        student_size: rows of the student's head.
        teacher_size: of the teacher's; None without a teacher.
        device: of the hidden states. How much of a GPU's memory is free is asked once.
        dtype: that the products' operands have.

    Raises:
        ValueError: not even one row fits `loss_memory_mb`.
    """
    columns = teacher_size and teacher_columns(make_objective(config), student_size, teacher_size)
    memory = config.loss_memory_mb
    if config.chunk_size == "auto" and device.type == "cuda":
        return _on_gpu(device, dtype, memory, student_size, columns)
    rows = rows_per_chunk(config.chunk_size, memory, student_size, columns)
    if config.chunk_size != "auto":
        return ChunkSize(rows, "distill.chunk_size")
    return ChunkSize(rows, f"distill.loss_memory_mb {memory or ON_CPU_MIB:g}")


@functools.cache
def _on_gpu(
    device: torch.device, dtype: torch.dtype, loss_memory_mb: float | None, student_size: int, columns: int | None
) -> ChunkSize:
    # Once: chunks that follow the free memory of each call would change the order of the sums, and the last bits
    return rows_on_gpu(speed_of(device, dtype), free_bytes(device), loss_memory_mb, student_size, columns)


def dense_bytes(num_rows: int, student_size: int, columns_of_teacher: int) -> int:
    """Bytes of the fp32 logits of all rows, both models' together; without a teacher, 0 columns of it."""
    return num_rows * (student_size + columns_of_teacher) * _BYTES_PER_LOGIT
