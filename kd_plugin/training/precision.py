"""`dtype: auto`: bfloat16 where the device multiplies it, float32 where it would only emulate it."""

from __future__ import annotations

import logging

import torch

from kd_plugin.engines.process_group import Placement, reduce_numbers
from kd_plugin.engines.protocol import DTYPES
from kd_plugin.loss import checks, processor
from kd_plugin.settings.run import RunConfig

logger = logging.getLogger(__name__)

__all__ = ["automatic_dtype", "settled_precision", "slow_dtype", "with_dtypes"]


def automatic_dtype(device: torch.device) -> tuple[str, str]:
    """What `dtype: auto` means on `device`, and why: "bfloat16", or "float32" where bfloat16 would be emulated."""
    if device.type == "cuda":
        if checks.has_bfloat16(device):
            return "bfloat16", "the GPU multiplies it"
        return "float32", f"{torch.cuda.get_device_name(device)} does not have bfloat16"
    if device.type == "cpu" and (instructions := processor.instructions(torch.bfloat16)):
        return "bfloat16", f"this processor multiplies it ({instructions})"
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


def settled_precision(config: RunConfig, place: Placement) -> RunConfig:
    """`config` with `dtype: auto` replaced, alike on all ranks.

    Raises:
        ValueError: a half precision that the device lacks.
    """
    if place.device.type == "cpu" and place.world_size > 1:
        processor.settle([reduce_numbers(processor.emulated_here(), op="max")])
    if "auto" in (config.student.dtype, config.teacher.dtype):
        chosen, why = automatic_dtype(place.device)
        slowest = reduce_numbers({"float32": chosen == "float32"}, op="max")
        if slowest["float32"] and chosen != "float32":
            chosen, why = "float32", "another rank's device needs it"
        logger.info("dtype: auto -> %s (%s)", chosen, why)
        config = with_dtypes(config, chosen)
    for role in ("teacher", "student"):
        name = getattr(config, role).dtype
        checks.half_precision(f"{role}.dtype", DTYPES[name], place.device)
        if warning := slow_dtype(name, place.device):
            logger.warning("%s.dtype %s", role, warning)
    return config
