"""The row pass as a Triton kernel: one program per row, fp32 inside, any vocabulary size.

The source is generated (see `codegen`), one kernel per objective and vocabulary size. On a GPU the block size and
the number of warps are tuned on a scratch copy of some rows, because the kernel writes over its input; under
Triton's interpreter (`TRITON_INTERPRET=1`, for tests on a CPU) they are fixed.
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
from kd_plugin.row_kernels.body import STATISTICS, RowSpec

logger = logging.getLogger(__name__)

_CURE = "set row_kernel to auto or compile"
_INTERPRETED_BLOCK = 256
# (columns of a block, warps), the tuner takes the fastest: 4 or 8 columns per thread, as every sum has one
# accumulator per column. More do not fit the registers of an objective with three sweeps.
_CONFIGS = ((1024, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16), (4096, 32))
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
    if spec.objective.by_rank:
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


@functools.cache
def _tuner(kernel: Kernel, vocab_size: int) -> Any:
    """The kernel that chooses its configuration at its first launch."""
    triton = _triton()
    widest = max(_CONFIGS[0][0], triton.next_power_of_2(vocab_size))
    configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in _CONFIGS if block <= widest]
    return triton.autotune(configs=configs, key=[])(kernel.function)


def row_pass(
    spec: RowSpec,
    student_logits: Tensor,  # [n, V] fp32, raw; overwritten with the gradient
    teacher_logits: Tensor | None,  # [n, V'] fp32, raw; V' <= V
    target_logits: Tensor | None,  # [n, 1]
    row_weights: Tensor | None,  # [n, 1]
) -> Tensor:
    """As `body.row_pass` -> statistics `[n, len(STATISTICS)]`. Raises `ValueError` for fp64, and as `build`."""
    if student_logits.dtype != torch.float32:
        raise ValueError(f"row_kernel triton computes in float32, found {student_logits.dtype} logits: {_CURE}")
    rows, vocab_size = student_logits.shape
    values = (student_logits, teacher_logits, target_logits, row_weights)
    tensors = {name: tensor for name, tensor in zip(expressions.INPUTS, values, strict=True) if tensor is not None}
    assert all(tensor.stride(1) == 1 or tensor.shape[1] == 1 for tensor in tensors.values())
    kernel = build(spec, vocab_size, tuple(tensors), None if teacher_logits is None else teacher_logits.shape[1])
    assert teacher_logits is None or teacher_logits.shape[1] <= vocab_size
    statistics = student_logits.new_empty(rows, len(STATISTICS))
    if rows == 0:
        return statistics
    with torch.cuda.device_of(student_logits):  # Triton launches on the current device
        if _triton().knobs.runtime.interpret:
            _launch(kernel.function, kernel, rows, tensors, statistics, BLOCK=_INTERPRETED_BLOCK)
        else:
            tuner = _tuner(kernel, vocab_size)
            if len(tuner.configs) > 1 and not tuner.cache:
                _tune(tuner, kernel, tensors, statistics)
            _launch(tuner, kernel, rows, tensors, statistics)
    return statistics


def _launch(
    function: Any, kernel: Kernel, rows: int, tensors: dict[str, Tensor], statistics: Tensor, **meta: int
) -> None:
    arguments: list[Any] = []
    for name in kernel.source.inputs:
        arguments += [tensors[name], tensors[name].stride(0)]
    function[(rows,)](*arguments, statistics, **meta, **_OPTIONS)


def _tune(tuner: Any, kernel: Kernel, tensors: dict[str, Tensor], statistics: Tensor) -> None:
    """Choose the configuration on copies of as many rows as run at once; the live logits are not touched."""
    student = tensors["student"]
    rows = min(student.shape[0], torch.cuda.get_device_properties(student.device).multi_processor_count)
    _launch(tuner, kernel, rows, {**tensors, "student": student[:rows].clone()}, statistics)
    logger.info("row_kernel triton: chose %s", tuner.best_config)
