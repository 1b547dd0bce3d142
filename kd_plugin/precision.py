"""`dtype: auto`: bfloat16 where the device multiplies it, float32 where it would only emulate it.

Many processors without AVX-512 or AMX units take ten times as long for a bfloat16 product as for a float32 one
(measured on Zen 3 with torch 2.13: 4 to 40 times). No list of instruction sets says so for every processor and every
build of torch, so it is measured: two small products, a tenth of a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from kd_plugin import checks
from kd_plugin.config import RunConfig

__all__ = ["automatic_dtype", "with_dtypes"]

logger = logging.getLogger(__name__)

_ROWS, _WIDTH = 128, 512


def automatic_dtype(device: torch.device) -> tuple[str, str]:
    """What `dtype: auto` means on `device`, and why: bfloat16 unless float32 is faster there."""
    if device.type == "cuda":
        if checks.has_bfloat16(device):
            return "bfloat16", "the GPU multiplies it"
        return "float32", f"{torch.cuda.get_device_name(device)} does not have bfloat16"
    wide, narrow = (_seconds_of_products(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    if narrow <= wide:
        return "bfloat16", f"its products take {narrow / wide:.1f} x as long as in float32 on this processor"
    return "float32", f"bfloat16 products take {narrow / wide:.0f} x as long on this processor"


def with_dtypes(config: RunConfig, dtype: str) -> RunConfig:
    """`config` with each model's `dtype: auto` replaced by `dtype`."""
    update = {
        role: section.model_copy(update={"dtype": dtype})
        for role in ("student", "teacher")
        if (section := getattr(config, role)).dtype == "auto"
    }
    return config.model_copy(update=update)


def _seconds_of_products(dtype: torch.dtype, device: torch.device) -> float:
    """Of a layer's forward product and of its gradient's, the fastest of a few."""
    hidden = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    return _fastest(lambda: hidden @ weight.t()) + _fastest(lambda: hidden @ weight)


def _fastest(product: Callable[[], torch.Tensor], repeats: int = 4) -> float:
    found = []
    for _ in range(repeats):  # the first pays for setting up
        start = time.perf_counter()
        product()
        found.append(time.perf_counter() - start)
    return min(found)
