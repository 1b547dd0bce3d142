"""bf16 products with an fp32 result on processors that have them (AVX512-BF16), for which torch has no operator.

Torch's own kernel for them (`cpublas::brgemm`, which its attention uses) multiplies a block of rows by a block of the
head; here blocks of 256 token ids are spread over threads. Measured on Zen 4 at D = 576, V = 49152, it takes 0.53 times
as long as oneDNN's fp32 product, as long as a bf16 product whose result is rounded, and the head's packed copy half the
memory of one in fp32.

A kernel that is refused ends the process, so a process of its own tries it first; then its results must prove exact.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kd_plugin.distributed.torch_internals import HALF_KERNEL, half_kernel
from kd_plugin.loss import processor
from kd_plugin.loss.buffers import buffer
from kd_plugin.loss.proven import is_exact

logger = logging.getLogger(__name__)

_COLUMNS, _ROWS = 256, 128  # with 576 numbers each in bf16, and their result in fp32: 0.6 MB of a core's cache
_INSTEAD = "the heads are multiplied in float32, from copies"
_TRIAL = """
import ctypes, sys
kernel = ctypes.CDLL(sys.argv[1])[sys.argv[2]]
number, ones, out = ctypes.c_int64, (ctypes.c_uint16 * 2048)(*[0x3F80] * 2048), (ctypes.c_float * 1024)()
sizes = map(number, (32, 32, 64, 64, 32, 32))
kernel(*sizes, ctypes.c_bool(False), ones, ones, out, ctypes.c_bool(True))
sys.exit(any(value != 64 for value in out))
"""


@functools.cache
def is_proven() -> bool:
    """Whether torch's kernel runs here and keeps fp32; the first call takes about a second."""
    if processor.instructions(torch.bfloat16) != "avx512_bf16" or half_kernel() is None or not _is_on():
        return False
    try:
        trial = subprocess.run([sys.executable, "-c", _TRIAL, *HALF_KERNEL], capture_output=True, timeout=60)
        failed = f"exit status {trial.returncode}" if trial.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        failed = type(error).__name__
    if failed:
        logger.warning("torch's bf16 kernel with an fp32 result fails here (%s): %s", failed, _INSTEAD)
        return False
    name = "torch's bf16 kernel with an fp32 result"
    return is_exact(name, _product, torch.bfloat16, torch.device("cpu"), _INSTEAD)


def _product(left: Tensor, right: Tensor) -> Tensor:
    out = torch.empty(left.shape[0], right.shape[1])
    PackedWeight("trial", right.t().contiguous()).multiply_into(out, left)
    return out


def _is_on() -> bool:
    """Whether torch's kernel would not be refused now: it belongs to oneDNN, which users may turn off."""
    return bool(torch.backends.mkldnn.enabled)


@functools.cache
def _threads(number: int, process: int) -> ThreadPoolExecutor:
    """Threads that multiply; of one process, since a fork leaves them behind."""
    return ThreadPoolExecutor(number, thread_name_prefix="kd_plugin products")


class PackedWeight:
    """A head weight `[V, D]` in bf16, D even, as the kernel reads it: pairs along D, in blocks of token ids.

    Args:
        name: of the buffer for it.
        weight: `[V, D]`; kept, too.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self._weight = weight
        size, width = weight.shape
        if not weight.is_contiguous() or weight.storage_offset() % 2:
            weight = weight.clone(memory_format=torch.contiguous_format)
        pairs = weight.view(torch.int32)
        self.packed = buffer(f"{name} packed", size, width // 2, torch.int32, weight.device)
        whole = size - size % _COLUMNS
        for start, stop, columns in ((0, whole, _COLUMNS), (whole, size, size - whole)):
            if stop > start:
                blocks = self.packed[start:stop].view(-1, width // 2, columns)
                blocks.copy_(pairs[start:stop].view(-1, columns, width // 2).transpose(1, 2))

    def multiply_into(self, out: Tensor, hidden: Tensor) -> None:
        """`out[n, V] = hidden[n, D] @ weight.T` in fp32, for `out` with contiguous rows."""
        kernel, hidden = half_kernel(), hidden.contiguous()
        if kernel is None or not _is_on():
            torch.mm(hidden.to(out.dtype), self._weight.t().to(out.dtype), out=out)
            return
        rows, width = hidden.shape
        number, stride = torch.get_num_threads(), out.stride(0)
        left, right, result = hidden.data_ptr(), self.packed.data_ptr(), out.data_ptr()

        def multiply(first: int) -> None:
            for start, columns in self._blocks(first, number):
                for row in range(0, rows, _ROWS):
                    sizes = min(_ROWS, rows - row), columns, width, width, columns, stride
                    operands = left + 2 * row * width, right + 2 * start * width
                    kernel(*sizes, False, *operands, result + 4 * (row * stride + start), True)

        if number == 1:
            multiply(0)
        else:
            list(_threads(number, os.getpid()).map(multiply, range(number)))

    def _blocks(self, first: int, step: int) -> Iterator[tuple[int, int]]:
        """First token id and number of every `step`-th block."""
        size = self._weight.shape[0]
        for start in range(first * _COLUMNS, size, step * _COLUMNS):
            yield start, min(_COLUMNS, size - start)
