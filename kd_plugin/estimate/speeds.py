"""How fast a device does each kind of work: from the table of peaks for a GPU; `calibration` measures a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kd_plugin.engines.protocol import DTYPES
from kd_plugin.estimate.setup import Setup
from kd_plugin.loss.device_speed import speed_by_peaks
from kd_plugin.settings.device_peaks import Peaks

__all__ = ["LayerSpeeds", "Speeds", "row_sweeps", "speeds_of_gpu"]

FLASH_ATTENTION = 0.7  # of what products reach: softmax between the two products (FlashAttention-2, arXiv:2307.08691)
WIRE_REACHED = 0.75  # of the link's peak by NCCL's large collectives, which send in protocol units and wait in rings
LAUNCH = 5e-6  # seconds that the host takes for one operation in eager PyTorch
COMPILED_SWEEPS = 5  # of the compiled row kernel over the vocabulary (`row_kernels.blocks`)
EAGER = 5.0  # times as long as the compiled kernel takes an eager one (measured on Zen 4: 4.3 to 9)
_FLOAT = 4


class LayerSpeeds(NamedTuple):
    """How fast one model's layers run in its dtype."""

    product: float
    """FLOP/s."""
    attention: float
    """FLOP/s of fused attention."""
    elementwise: float
    """Bytes/s that eager operations on activations read and write."""


@dataclass(frozen=True)
class Speeds:
    """How fast one rank does each kind of work."""

    student: LayerSpeeds
    teacher: LayerSpeeds
    student_logits: float
    """FLOP/s of the product with its head."""
    teacher_logits: float
    """Likewise."""
    hidden_gradient: float
    """FLOP/s of the product for the gradient of the hidden states."""
    head_gradient: float
    """FLOP/s of the product for the gradient of the head's weight, which adds up in fp32."""
    memory: float
    """Bytes/s of large copies, read and written together."""
    fresh: float
    """The same into memory that was just allocated: a CPU has to map it first, a GPU's allocator keeps it."""
    logit_seconds: float
    """Of the row pass, for one token id of one row, both models' logits."""
    wire: float
    """Bytes/s that a rank receives; 0 for one rank."""
    operation_seconds: float
    """Of the host, for one operation of eager PyTorch."""
    is_asynchronous: bool
    """Whether the host runs ahead of the device, and parameters and gradients travel while it computes."""
    how: str
    """Where these numbers come from."""


def speeds_of_gpu(setup: Setup, peaks: Peaks) -> Speeds:
    """What a GPU of these `peaks` reaches; fp32 operands are not rounded to tf32, which is PyTorch's default."""
    reached = {side: speed_by_peaks(peaks, dtype).flops for side, dtype in dtypes(setup).items()}
    layers = {side: LayerSpeeds(flops, FLASH_ATTENTION * flops, peaks.memory) for side, flops in reached.items()}
    sweeps = row_sweeps(setup) * 2 * _FLOAT + _FLOAT
    return Speeds(
        **layers,
        student_logits=reached["student"],
        teacher_logits=reached["teacher"],
        hidden_gradient=reached["student"],
        head_gradient=reached["student"],
        memory=peaks.memory,
        fresh=peaks.memory,
        logit_seconds=sweeps / peaks.memory,
        wire=WIRE_REACHED * peaks.wire,
        operation_seconds=LAUNCH,
        is_asynchronous=True,
        how=f"{setup.gpu} from the table of peaks, not measured",
    )


def row_sweeps(setup: Setup) -> float:
    """Sweeps over the vocabulary, or what takes as long, of the row pass of `setup`.

    Each temperature besides 1 has softmaxes of its own. Metrics take an eighth of it (measured on Zen 4).
    """
    distill = setup.distill
    temperatures = {term.temperature for term in distill.terms or ()} | {distill.temperature}
    sweeps = COMPILED_SWEEPS * (1 + 0.3 * len(temperatures - {1.0, None})) * (1.0 if distill.metrics else 0.875)
    return sweeps * (EAGER if distill.row_kernel == "eager" else 1.0)


def dtypes(setup: Setup) -> dict[str, torch.dtype]:
    """The dtype that each model computes in."""
    return {side: DTYPES[getattr(setup.config, side).dtype] for side in ("student", "teacher")}
