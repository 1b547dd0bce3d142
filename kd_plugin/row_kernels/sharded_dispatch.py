"""The three parts of a vocabulary-parallel row pass by the chosen kernel; see `sharded_row_pass`.

Triton has no version of them: `row_kernel: triton` runs them compiled.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from kd_plugin.distributed.vocab_slice import Sizes
from kd_plugin.row_kernels import sharded_numbers, sharded_row_pass
from kd_plugin.row_kernels.blocks import compiled, in_blocks
from kd_plugin.row_kernels.row_pass import RowSpec

logger = logging.getLogger(__name__)


@functools.cache
def _part(part: Callable[..., Tensor], spec: RowSpec, sizes: Sizes, compile_it: bool) -> Callable[..., Tensor]:
    body = functools.partial(part, spec, sizes)
    return compiled(body) if compile_it else body


@functools.cache
def _say_compiled() -> None:
    logger.warning("row_kernel: triton has no version for exchange: stats, which runs compiled")


def _run(kernel: str, part: Callable[..., Tensor], spec: RowSpec, sizes: Sizes, *tensors: Tensor | None) -> Tensor:
    logits = tensors[0]
    assert logits is not None
    if kernel == "triton":
        _say_compiled()
    body = _part(part, spec, sizes, kernel != "eager")
    return in_blocks(body, logits.shape[0], logits.shape[1], logits.device.type, tensors)


def moments(kernel: str, spec: RowSpec, sizes: Sizes, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """This rank's `[n, M]`; a rank without columns has no mass."""
    return _run(kernel, sharded_row_pass.slice_moments, spec, sizes, student_logits, teacher_logits)


def sums(
    kernel: str,
    spec: RowSpec,
    sizes: Sizes,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    merged: Tensor,
) -> Tensor:
    """This rank's `[n, S]`; S is 0 for divergences that need no second round."""
    if not sharded_numbers.has_sums(spec.objective):
        return merged.new_zeros(merged.shape[0], 0)
    return _run(kernel, sharded_row_pass.slice_sums, spec, sizes, student_logits, teacher_logits, merged)


def finish(
    kernel: str,
    spec: RowSpec,
    sizes: Sizes,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    row_weights: Tensor | None,
    merged: Tensor,
    added: Tensor,
    hard_weights: Tensor | None = None,
) -> Tensor:
    """Statistics of all rows; leaves the gradient of this rank's columns in `student_logits`."""
    tensors = (student_logits, teacher_logits, row_weights, merged, added, hard_weights)
    return _run(kernel, sharded_row_pass.slice_finish, spec, sizes, *tensors)
