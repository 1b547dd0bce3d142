"""How many rows a chunk has, by `distill.chunk_size` and `distill.loss_memory_mb`, and what its logits take."""

from __future__ import annotations

from kd_plugin.divergences.objective import Objective, make_objective
from kd_plugin.settings.run import DistillConfig

_MIB = 2**20


_BYTES_PER_LOGIT = 4  # fp32


def rows_per_chunk(
    chunk_size: int | str, loss_memory_mb: float, vocab_size: int, teacher_vocab_size: int | None = None
) -> int:
    """Rows C of one chunk: `chunk_size`, or the most for which 8 * C * V bytes fit `loss_memory_mb` MiB.

    From 64 rows on, the automatic value is a multiple of 64. Where the teacher's rows have another number of logits
    than the student's, `teacher_vocab_size` V', it is 4 * C * (V + V') bytes. Raises `ValueError` if not even one row
    fits.
    """
    if chunk_size != "auto":
        return int(chunk_size)
    row_bytes = _BYTES_PER_LOGIT * (vocab_size + (teacher_vocab_size or vocab_size))
    rows = int(loss_memory_mb * _MIB) // row_bytes
    if rows < 1:
        enough = 1.006 * row_bytes / _MIB  # three digits of it are never too few
        raise ValueError(
            f"loss_memory_mb={loss_memory_mb:g} does not hold one row of {vocab_size} logits; "
            f"one row needs {enough:.3g} MiB: raise loss_memory_mb"
        )
    return rows if rows < 64 else rows // 64 * 64


def teacher_columns(objective: Objective, student_size: int, teacher_size: int) -> int:
    """Columns of the teacher's logits that the loss reads: those of the token ids that the student has; for uld all."""
    return teacher_size if objective.sorts else min(student_size, teacher_size)


def chunk_rows(config: DistillConfig, student_size: int, teacher_size: int | None) -> int:
    """Rows of one chunk by `config`, for heads of so many rows; `teacher_size` is None without a teacher.

    Raises `ValueError` as `rows_per_chunk`.
    """
    columns = teacher_size and teacher_columns(make_objective(config), student_size, teacher_size)
    return rows_per_chunk(config.chunk_size, config.loss_memory_mb, student_size, columns)


def dense_bytes(num_rows: int, student_size: int, columns_of_teacher: int) -> int:
    """Bytes of the fp32 logits of all rows, both models' together; without a teacher, 0 columns of it."""
    return num_rows * (student_size + columns_of_teacher) * _BYTES_PER_LOGIT
