# pyright: strict
"""What the GPUs of data centres can do at most, as their makers say it; a rule that weighs work by time reads it here.

Sources: NVIDIA's data sheets of A100, H100, H200 and HGX B200, AMD's of the Instinct MI300X. Products are dense: the
figures with sparsity are halved.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PEAKS", "Peaks", "peaks_of"]


class Peaks(NamedTuple):
    """What one device can do at most."""

    half_flops: float
    """FLOP/s of products of bf16 or fp16."""
    tf32_flops: float
    """FLOP/s of products of fp32 that may round their operands to tf32."""
    fp32_flops: float
    """FLOP/s of products of fp32."""
    memory: float
    """Bytes/s between the device and its memory, read and written together."""
    wire: float
    """Bytes/s that it receives from the other devices of its machine."""


PEAKS: dict[str, Peaks] = {
    "H100 PCIe": Peaks(756e12, 378e12, 51e12, 2.0e12, 64e9),
    "H100 NVL": Peaks(835e12, 417e12, 60e12, 3.9e12, 300e9),
    "H100": Peaks(989e12, 494e12, 67e12, 3.35e12, 450e9),
    "H200": Peaks(989e12, 494e12, 67e12, 4.8e12, 450e9),
    "B200": Peaks(2250e12, 1125e12, 75e12, 8.0e12, 900e9),
    "A100-SXM4-40GB": Peaks(312e12, 156e12, 19.5e12, 1.555e12, 300e9),
    "A100 80GB PCIe": Peaks(312e12, 156e12, 19.5e12, 1.935e12, 64e9),
    "A100": Peaks(312e12, 156e12, 19.5e12, 2.039e12, 300e9),
    "MI300X": Peaks(1307e12, 654e12, 163e12, 5.3e12, 448e9),
}
"""By a part of the name that torch has for the device; a name before another of which it is a longer form."""


def peaks_of(device_name: str) -> Peaks | None:
    """What the device of this name (`torch.cuda.get_device_name()`) can do; None for one that is not in the table."""
    return next((peaks for name, peaks in PEAKS.items() if name in device_name), None)
