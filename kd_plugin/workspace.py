"""Buffers that are used again: by the next chunk, and by the next step."""

from __future__ import annotations

import torch
from torch import Tensor

_cpu_workspace: dict[tuple[torch.dtype, str], Tensor] = {}


def buffer(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A `[rows, columns]` buffer. CUDA's allocator keeps freed blocks; on a CPU, where fresh pages cost more
    than the row pass that fills them, the largest buffer so far is kept (see `release_workspace`)."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    flat = _cpu_workspace.get((dtype, name))
    if flat is None or flat.numel() < rows * columns:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            flat = _cpu_workspace[dtype, name] = torch.empty(rows * columns, dtype=dtype)
    return flat[: rows * columns].view(rows, columns)


def release_workspace() -> None:
    """Give back the chunk buffers kept for the next step (CPU only)."""
    _cpu_workspace.clear()
