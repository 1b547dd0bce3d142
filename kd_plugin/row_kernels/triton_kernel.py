"""The row pass as a Triton kernel: one program per row, fp32 inside, any vocabulary size.

The source is generated (see `codegen`), one kernel per objective and vocabulary size. Block size and number of warps
follow from the vocabulary and the objective (`launch_shape`). They are not tuned by timing: the sums of a row depend on
them in their last bits, and then two runs, or two ranks, could differ.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_plugin.row_kernels import codegen, expressions
from kd_plugin.row_kernels.row_pass import RowSpec
from kd_plugin.row_kernels.statistics import STATISTICS

logger = logging.getLogger(__name__)

_CURE = "set row_kernel to auto or compile"
_INTERPRETED_BLOCK = 256
# Without fused multiply-add, so that an expression rounds alike for a row and for its tokens: the top token is
# the one whose log-probability equals the row's maximum.
_OPTIONS = {"enable_fp_fusion": False}


def check_available(device_type: str) -> None:
    """Raises `ImportError` without triton, `ValueError` without a GPU that it can compile for."""
    triton = _triton()
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"row_kernel triton needs CUDA tensors, found {device_type}: {_CURE} "
            "(TRITON_INTERPRET=1 runs it on a CPU, very slowly)"
        )


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"row_kernel triton needs triton: pip install triton, or {_CURE}") from error
    return triton


class Kernel(NamedTuple):
    """A compiled-on-first-launch kernel."""

    source: codegen.Source
    function: Any
    """Triton's JITFunction, or its interpreter's stand-in."""


@functools.cache
def build(spec: RowSpec, vocab_size: int, given: tuple[str, ...], teacher_size: int | None = None) -> Kernel:
    """The kernel for rows of `vocab_size` logits; `given` and `teacher_size` as in `expressions.trace`.

    Raises `ValueError` naming what Triton cannot do here: a sort (`uld`), or an operation of a registered
    divergence.
    """
    triton = _triton()
    names = [term.divergence.name for term in spec.objective.terms]
    if spec.objective.sorts:
        raise ValueError(f"row_kernel triton has no sort, which divergence {', '.join(names)} needs: {_CURE}")
    start = time.perf_counter()
    try:
        source = codegen.generate(spec, vocab_size, given, teacher_size)
    except expressions.Unsupported as error:
        raise ValueError(f"row_kernel triton has no {error}, which {', '.join(names)} uses: {_CURE}") from error
    from kd_plugin.row_kernels import triton_math

    # Triton reads a kernel's source through inspect, which finds it in linecache
    filename = f"<kd_plugin row kernel {hashlib.sha256(source.text.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    namespace = vars(triton_math).copy()
    exec(compile(source.text, filename, "exec", dont_inherit=True), namespace)
    logger.info(
        "row_kernel triton: %d sweeps over %d tokens (written in %.2f s)",
        source.sweeps,
        vocab_size,
        time.perf_counter() - start,
    )
    return Kernel(source, triton.jit(namespace["row_kernel"]))


def launch_shape(vocab_size: int, sweeps: int) -> dict[str, int]:
    """Columns of a block and warps of a program.

    Every sum has one accumulator per column: 8 columns per thread, 4 where a third sweep needs its registers.
    """
    block = 1024 if vocab_size <= 1024 else 2048
    columns_per_thread = 8 if sweeps <= 2 else 4
    return {"BLOCK": block, "num_warps": block // (32 * columns_per_thread)}


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V'] fp32, raw; V' <= V
    target_logits: Tensor | None,  # [n, 1]
    row_weights: Tensor | None,  # [n, 1]
    hard_weights: Tensor | None = None,  # [n, 1]
) -> Tensor:
    """As `row_pass.row_pass` -> statistics `[n, len(STATISTICS)]`. Raises `ValueError` for fp64, and as `build`."""
    if student_logits.dtype != torch.float32:
        raise ValueError(f"row_kernel triton computes in float32, found {student_logits.dtype} logits: {_CURE}")
    rows, vocab_size = student_logits.shape
    values = (student_logits, teacher_logits, target_logits, row_weights, hard_weights)
    tensors = {name: tensor for name, tensor in zip(expressions.INPUTS, values, strict=True) if tensor is not None}
    assert all(tensor.stride(1) == 1 or tensor.shape[1] == 1 for tensor in tensors.values())
    kernel = build(spec, vocab_size, tuple(tensors), None if teacher_logits is None else teacher_logits.shape[1])
    assert teacher_logits is None or teacher_logits.shape[1] <= vocab_size
    statistics = student_logits.new_empty(rows, len(STATISTICS))
    if rows == 0:
        return statistics
    with torch.cuda.device_of(student_logits):  # Triton launches on the current device
        interpreted = _triton().knobs.runtime.interpret
        shape = {"BLOCK": _INTERPRETED_BLOCK} if interpreted else launch_shape(vocab_size, kernel.source.sweeps)
        _launch(kernel, rows, tensors, statistics, shape)
    return statistics


def _launch(kernel: Kernel, rows: int, tensors: dict[str, Tensor], statistics: Tensor, shape: dict[str, int]) -> None:
    arguments: list[Tensor | int] = []
    for name in kernel.source.inputs:
        arguments += [tensors[name], tensors[name].stride(0)]
    kernel.function[(rows,)](*arguments, statistics, **shape, **_OPTIONS)
