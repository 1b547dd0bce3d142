# Kernels are written without types:
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
"""Functions that Triton's language lacks. Import this late: it imports triton.

Polynomials instead of CUDA's libdevice: they also run under Triton's interpreter and on other vendors' GPUs, so
what the tests on a CPU check is what runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1 to about 3e-7 relative, also near 0; fp32."""
    # Taylor up to x**9: the first term left out is 0.5**9 / 10! = 5e-10 of the value
    series = 1.0 + x * (1 / 8) * (1.0 + x * (1 / 9))
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * series)
    series = 1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series)
    series = 1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * series)
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) to about 3e-7 relative, also near 0; fp32, x >= -1."""
    # 2 artanh(z), abs(z) <= 1/3 where it is used: the first term left out is z**16 / 17 = 1e-9 of the value
    z = x / (2.0 + x)
    w = z * z
    series = 1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * series)))
    return tl.where(tl.abs(x) < 0.5, 2.0 * z * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent; fp32."""
    t = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, t, -t) / (2.0 + t)


@triton.jit
def sign(x):
    """-1, 0 or 1; fp32."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
