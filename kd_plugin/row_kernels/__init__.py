"""The body of one chunk in its interchangeable versions, all with `row_pass`'s signature."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from kd_plugin.row_kernels import triton_kernel
from kd_plugin.row_kernels.body import (
    IDENTITY,
    NUM_LOSSES,
    STATISTICS,
    LogitTransform,
    RowSpec,
    row_pass,
    subtract_labels,
)

__all__ = [
    "IDENTITY",
    "NUM_LOSSES",
    "STATISTICS",
    "LogitTransform",
    "RowSpec",
    "block_rows",
    "choose",
    "row_pass",
    "run",
    "subtract_labels",
]

logger = logging.getLogger(__name__)

# A chunk is passed to the compiled kernel in blocks of rows, given in bytes of both models' logits. On a CPU they
# stay in the last-level cache, so that its five or so sweeps over the vocabulary read memory once (measured on 2
# Zen cores at V = 49152: 1.6x faster). Everywhere they bound what the kernel keeps between its loops: up to three
# more arrays of a block's `[rows, V]`. The bound for other devices is a guess: not measured on a GPU.
_BLOCK_BYTES = {"cpu": 8 * 2**20}
_OTHER_BLOCK_BYTES = 256 * 2**20
# A graph is specialised to V, dtype and strides; more than this many per objective means something is wrong.
_MAX_GRAPHS = 64


@functools.cache
def choose(row_kernel: str, device_type: str) -> str:
    """`auto` -> the kernel that runs on this device; anything else unchanged. Logged once.

    Raises `ValueError` (`ImportError`) for `triton` without a GPU (without triton).
    """
    if row_kernel == "triton":
        triton_kernel.check_available(device_type)
    if row_kernel != "auto":
        return row_kernel
    compilers = ["c++", "g++", "clang++"] if device_type == "cpu" else ["nvcc", "gcc", "cc", "clang"]
    found = os.environ.get("CXX") or any(shutil.which(name) for name in compilers)
    chosen = "compile" if found else "eager"
    logger.info("row_kernel: auto -> %s (%s)", chosen, "compiler found" if found else f"none of {compilers} in PATH")
    return chosen


@functools.cache
def _compiled(spec: RowSpec) -> Callable[..., Tensor]:
    def body(*tensors: Tensor | None) -> Tensor:
        return row_pass(spec, *tensors)

    return torch.compile(body, fullgraph=True, isolate_recompiles=True, recompile_limit=_MAX_GRAPHS)


def block_rows(vocab_size: int, device_type: str) -> int:
    """Rows that the compiled kernel takes at a time."""
    return max(2, _BLOCK_BYTES.get(device_type, _OTHER_BLOCK_BYTES) // (8 * vocab_size))


def run(
    kernel: str,
    spec: RowSpec,
    num_rows: int,
    student_logits: Tensor,  # [>= max(num_rows, 2), V]
    teacher_logits: Tensor | None,  # [>= max(num_rows, 2), V]
    target_logits: Tensor | None,  # [num_rows, 1]
    row_weights: Tensor | None,  # [num_rows, 1]
) -> Tensor:
    """`row_pass` over the first `num_rows` rows by the chosen kernel -> statistics `[num_rows, K]`.

    The number of rows is the one dynamic dimension of the compiled graph, so ragged chunks neither recompile
    nor need padding. torch.compile treats a size of 1 as a constant; a single row therefore takes a second,
    meaningless one from the buffer along.
    """
    if kernel in ("eager", "triton"):
        body = row_pass if kernel == "eager" else triton_kernel.row_pass
        tensors = (t if t is None else t[:num_rows] for t in (student_logits, teacher_logits))
        return body(spec, *tensors, target_logits, row_weights)
    return _run_compiled(spec, num_rows, student_logits, teacher_logits, target_logits, row_weights)


def _run_compiled(
    spec: RowSpec,
    num_rows: int,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target_logits: Tensor | None,
    row_weights: Tensor | None,
) -> Tensor:
    body = _compiled(spec)
    tensors = (student_logits, teacher_logits, target_logits, row_weights)
    block = block_rows(student_logits.shape[1], student_logits.device.type)
    statistics = []
    start = 0
    # The objective's weights and temperatures are constants of the graph, not inputs that could vary.
    with torch._dynamo.config.patch(specialize_float=True):
        while start < num_rows:
            stop = num_rows if num_rows - start <= block + 1 else start + block  # never leaves a single row over
            length = stop - start
            statistics.append(body(*(_piece(tensor, start, max(length, 2)) for tensor in tensors))[:length])
            start = stop
    return statistics[0] if len(statistics) == 1 else torch.cat(statistics)


def _piece(tensor: Tensor | None, start: int, length: int) -> Tensor | None:
    if tensor is None:
        return None
    piece = tensor[start : start + length]
    if piece.shape[0] < length:  # one row of [num_rows, 1]: repeat it
        piece = piece.expand(length, -1).contiguous()
    torch._dynamo.maybe_mark_dynamic(piece, 0)
    return piece
