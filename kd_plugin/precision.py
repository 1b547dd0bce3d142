"""`dtype: auto`: bfloat16 where the device multiplies it, float32 where it would only emulate it."""

from __future__ import annotations

import torch

from kd_plugin import checks, processor
from kd_plugin.config import RunConfig

__all__ = ["automatic_dtype", "slow_dtype", "with_dtypes"]


def automatic_dtype(device: torch.device) -> tuple[str, str]:
    """What `dtype: auto` means on `device`, and why: bfloat16 unless it would be emulated there."""
    if device.type == "cuda":
        if checks.has_bfloat16(device):
            return "bfloat16", "the GPU multiplies it"
        return "float32", f"{torch.cuda.get_device_name(device)} does not have bfloat16"
    if device.type == "cpu" and (found := processor.instructions(torch.bfloat16)):
        return "bfloat16", f"this processor multiplies it ({found})"
    return "float32", f"this processor has none of {processor.wanted(torch.bfloat16)}"


def slow_dtype(name: str, device: torch.device) -> str:
    """A warning about a half precision that `device` only emulates; empty for any other."""
    dtype = processor.HALVES.get(name)
    if device.type != "cpu" or dtype is None or processor.instructions(dtype):
        return ""
    return f"{name} is emulated: this processor has none of {processor.wanted(dtype)}; write float32, or auto"


def with_dtypes(config: RunConfig, dtype: str) -> RunConfig:
    """`config` with each model's `dtype: auto` replaced by `dtype`."""
    update = {
        role: section.model_copy(update={"dtype": dtype})
        for role in ("student", "teacher")
        if (section := getattr(config, role)).dtype == "auto"
    }
    return config.model_copy(update=update)
