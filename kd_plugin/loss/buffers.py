"""Buffers that are used again: by the next chunk, and by the next step."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Workspace(threading.local):
    """One per thread: two losses computed at once must not share a buffer."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, str], Tensor] = {}


_cpu = _Workspace()


def buffer(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A `[rows, columns]` buffer. CUDA's allocator keeps freed blocks; on a CPU, where fresh pages cost more
    than the row pass that fills them, the largest buffer so far is kept (see `release_workspace`)."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    flat = _cpu.buffers.get((dtype, name))
    if flat is None or flat.numel() < rows * columns:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            flat = _cpu.buffers[dtype, name] = torch.empty(rows * columns, dtype=dtype, device="cpu")
    return flat[: rows * columns].view(rows, columns)


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there, together."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def release_workspace() -> None:
    """Give back the chunk buffers that this thread keeps for the next step (CPU only)."""
    _cpu.buffers.clear()
