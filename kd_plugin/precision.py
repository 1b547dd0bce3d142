"""`dtype: auto`: bfloat16 where the device multiplies it, float32 where it would only emulate it."""

from __future__ import annotations

import torch

from kd_plugin import checks
from kd_plugin.config import RunConfig
from kd_plugin.matmul import slowdown

__all__ = ["automatic_dtype", "slow_dtype", "with_dtypes"]


def automatic_dtype(device: torch.device) -> tuple[str, str]:
    """What `dtype: auto` means on `device`, and why: bfloat16 unless float32 is faster there."""
    if device.type == "cuda":
        if checks.has_bfloat16(device):
            return "bfloat16", "the GPU multiplies it"
        return "float32", f"{torch.cuda.get_device_name(device)} does not have bfloat16"
    times = slowdown(torch.bfloat16, device.type)
    if times <= 1:
        return "bfloat16", f"its products take {times:.1f} x as long as in float32 on this processor"
    return "float32", f"bfloat16 products take {times:.0f} x as long on this processor"


def slow_dtype(name: str, device: torch.device) -> str:
    """A warning about a half precision that `device` only emulates; empty for any other."""
    times = slowdown(getattr(torch, name), "cpu") if device.type == "cpu" and name != "float32" else 1.0
    if times <= 2:
        return ""
    return f"{name}: its products take {times:.0f} x as long as in float32 on this processor; write float32, or auto"


def with_dtypes(config: RunConfig, dtype: str) -> RunConfig:
    """`config` with each model's `dtype: auto` replaced by `dtype`."""
    update = {
        role: section.model_copy(update={"dtype": dtype})
        for role in ("student", "teacher")
        if (section := getattr(config, role)).dtype == "auto"
    }
    return config.model_copy(update=update)
