"""In what the run that is to go on differs from the one that wrote its checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from kd_plugin.loss import processor
from kd_plugin.row_kernels import dispatch
from kd_plugin.settings.run import RunConfig

__all__ = ["changed_sections", "numerics"]

_SAME = ("student", "teacher", "distill", "data", "deepspeed")
"""Sections that make it another run when they change."""


def numerics(config: RunConfig) -> dict[str, str]:
    """What the last bits of a run depend on besides its settings."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"torch": str(torch.__version__), "row_kernel": dispatch.choose(config.distill.row_kernel, kind)}
    if kind == "cuda":
        return found | {"device": torch.cuda.get_device_name()}
    name = torch.cpu.get_capabilities().get("cpu_name", kind)
    found["device"] = f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for name, dtype in processor.HALVES.items():
        found[f"{name} products"] = processor.describe(dtype)
    return found


def changed_sections(before: dict[str, Any], config: RunConfig) -> dict[str, str]:
    """Name of each section that differs -> those of its settings that do."""
    now, changed = config.model_dump(mode="json"), {}
    for name in _SAME:
        old, new = before.get(name) or {}, now[name] or {}
        if before.get(name) != now[name]:
            changed[name] = ", ".join(key for key in [*new, *(old.keys() - new)] if old.get(key) != new.get(key))
    return changed
