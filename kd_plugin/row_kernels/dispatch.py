"""The body of one chunk in its interchangeable versions, all with `row_pass`'s signature."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

from kd_plugin.row_kernels import triton_kernel
from kd_plugin.row_kernels.blocks import compiled, in_blocks
from kd_plugin.row_kernels.row_pass import RowSpec, row_pass

logger = logging.getLogger(__name__)


@functools.cache
def choose(row_kernel: str, device_type: str) -> str:
    """`auto` -> the kernel that runs on this device; anything else unchanged. What runs is logged once.

    Raises `ValueError` (`ImportError`) for `triton` without a GPU (without triton).
    """
    if row_kernel == "triton":
        triton_kernel.check_available(device_type)
    if row_kernel != "auto":
        logger.info("row_kernel: %s", row_kernel)
        return row_kernel
    missing = missing_compiler(device_type)
    chosen = "eager" if missing else "compile"
    logger.info("row_kernel: auto -> %s (%s)", chosen, missing or "compiler found")
    return chosen


def missing_compiler(device_type: str) -> str:
    """What torch.compile lacks for a "cpu" or "cuda" device on this machine; empty where nothing is missing."""
    compilers = ["c++", "g++", "clang++"] if device_type == "cpu" else ["nvcc", "gcc", "cc", "clang"]
    missing = []
    if not (os.environ.get("CXX") or any(shutil.which(name) for name in compilers)):
        missing.append(f"none of {compilers} in PATH")
    if device_type != "cpu" and find_spec("triton") is None:  # which torch.compile generates code for there
        missing.append("triton is not installed")
    return ", ".join(missing)


@functools.cache
def _compiled(spec: RowSpec) -> Callable[..., Tensor]:
    return compiled(functools.partial(row_pass, spec))


def run(
    kernel: str,
    spec: RowSpec,
    num_rows: int,
    student_logits: Tensor,  # [>= max(num_rows, 2), V]
    teacher_logits: Tensor | None,  # [>= max(num_rows, 2), V']
    target_logits: Tensor | None,  # [num_rows, 1]
    row_weights: Tensor | None,  # [num_rows, 1]
    hard_weights: Tensor | None = None,  # [num_rows, 1]
) -> Tensor:
    """`row_pass` over the first `num_rows` rows by the chosen kernel -> statistics `[num_rows, K]`.

    A single row takes a second, meaningless one from the buffer along (`in_blocks` says why).
    """
    if kernel == "triton":
        teacher = None if teacher_logits is None else teacher_logits[:num_rows]
        return triton_kernel.row_pass(
            spec, student_logits[:num_rows], teacher, target_logits, row_weights, hard_weights
        )
    body = functools.partial(row_pass, spec) if kernel == "eager" else _compiled(spec)
    tensors = (student_logits, teacher_logits, target_logits, row_weights, hard_weights)
    return in_blocks(body, num_rows, student_logits.shape[1], student_logits.device.type, tensors)
