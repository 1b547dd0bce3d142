"""Matrix products that are used only where they have proven, once in a process, that they do not round.

Some fast products of torch's backends are exact by documentation or by observation only. Each is tried on small
matrices against fp64 before its first use; one that rounds, or fails, is dropped with a warning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor], Tensor]
"""`([n, D], [D, V]) -> [n, V]`."""

_SHAPE = (96, 576, 320)  # n, D, V: large enough for the kernels that serve large products
# fp32 sums of 576 terms land near 1e-6; a result or operands rounded to bf16 at 2e-3, to tf32 or fp16 at 2e-4.
_TOLERANCE = 3e-5


def relative_error(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """|computed - exact| / |exact| of a small `product` of `dtype` operands on `device`, against the same in fp64."""
    rows, width, columns = _SHAPE
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator).to(dtype)
    right = torch.randn(width, columns, generator=generator).to(dtype)
    exact = left.double() @ right.double()
    computed = product(left.to(device), right.to(device)).cpu().double()
    return float((computed - exact).norm() / exact.norm())


def is_exact(name: str, product: Product, dtype: torch.dtype, device: torch.device, instead: str) -> bool:
    """Whether `product` keeps fp32; says once by `name` that it does not, and what is used `instead`."""
    try:
        error = relative_error(product, dtype, device)
    except (RuntimeError, TypeError, NotImplementedError) as problem:
        logger.warning("%s fails here (%s): %s", name, str(problem).splitlines()[0], instead)
        return False
    if not error <= _TOLERANCE:
        logger.warning("%s rounds here (relative error %.1e against fp64): %s", name, error, instead)
        return False
    return True


@functools.cache
def half_with_fp32_result(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of half precision `dtype` on a GPU give the unrounded result that `out_dtype` promises."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out_dtype=torch.float32)

    name = f"torch.mm({str(dtype).removeprefix('torch.')}, out_dtype=float32) on {device}"
    return is_exact(name, product, dtype, device, "the heads are multiplied in float32, from copies")
