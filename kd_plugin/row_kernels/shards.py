"""The three parts of a vocabulary-parallel row pass by the chosen kernel; see `shard_body`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kd_plugin.row_kernels import shard_body
from kd_plugin.row_kernels.body import RowSpec

merge = shard_body.merge_moments


@functools.cache
def _compiled(part: Callable[..., Tensor], spec: RowSpec) -> Callable[..., Tensor]:
    return torch.compile(functools.partial(part, spec), fullgraph=True, isolate_recompiles=True, recompile_limit=64)


def _run(kernel: str, part: Callable[..., Tensor], spec: RowSpec, *arguments: Tensor | int | None) -> Tensor:
    if kernel == "eager":
        return part(spec, *arguments)
    for argument in arguments:
        if isinstance(argument, Tensor):
            torch._dynamo.maybe_mark_dynamic(argument, 0)  # rows: one graph whatever the batch
    with torch._dynamo.config.patch(specialize_float=True):
        return _compiled(part, spec)(*arguments)


def moments(kernel: str, spec: RowSpec, student_logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """This rank's `[n, 2k]`; a rank without columns has no mass."""
    if student_logits.shape[1] == 0:
        return shard_body.no_moments(spec, student_logits)
    return _run(kernel, shard_body.shard_moments, spec, student_logits, teacher_logits)


def sums(
    kernel: str,
    spec: RowSpec,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    merged: Tensor,
    vocab_size: int,
) -> Tensor:
    """This rank's `[n, S]`."""
    return _run(kernel, shard_body.shard_sums, spec, student_logits, teacher_logits, merged, vocab_size)


def finish(
    kernel: str,
    spec: RowSpec,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target_logits: Tensor | None,
    row_weights: Tensor | None,
    merged: Tensor,
    added: Tensor,
    vocab_size: int,
) -> Tensor:
    """Statistics of all rows; leaves the gradient of this rank's columns in `student_logits`."""
    return _run(
        kernel,
        shard_body.shard_finish,
        spec,
        student_logits,
        teacher_logits,
        target_logits,
        row_weights,
        merged,
        added,
        vocab_size,
    )
