"""A run whose numbers stopped being numbers: noticed within a few steps, by all ranks in the same one.

Notable decisions:
- what a step did is remembered on its device and read every `CHECK_EVERY` steps, so that no step waits for it;
- fp16 leaves out steps whose gradient overflowed, until its loss scale fits: only many in a row are a fault;
- an infinite loss alone is none, if its gradient is finite: a divergence may be infinite where a teacher is certain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_plugin.distributed.layout import values_here
from kd_plugin.distributed.torch_internals import inner_tensors
from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.engines.zero_block import uses_autocast
from kd_plugin.settings.run import RunConfig

__all__ = [
    "CHECK_EVERY",
    "BrokenWeightsError",
    "DivergedError",
    "FiniteWatch",
    "check_weights",
    "has_finite_parameters",
    "scales_loss",
]

CHECK_EVERY = 8
"""Steps from one look at the device to the next."""
# Steps in a row, of (NaN losses, gradients that are not finite). A NaN loss was not scaled yet: no scale cures it. A
# scale starts at 2 ** 16 and is halved at each step that is left out: after 40 of them it has nothing to offer.
_UNSCALED_LIMITS, _SCALED_LIMITS = (1, 1), (CHECK_EVERY, 40)


class DivergedError(ValueError):
    """The student's numbers are no numbers any more."""


class BrokenWeightsError(ValueError):
    """A model was loaded whose weights are no numbers."""


class FiniteWatch:
    """Remembers on the device when losses or gradients stopped being finite.

    Args:
        scaled: steps whose gradient is not finite are left out (fp16's loss scaling).
    """

    def __init__(self, *, scaled: bool) -> None:
        self._limits = _SCALED_LIMITS if scaled else _UNSCALED_LIMITS
        self._last = 0
        self._in_a_row: Tensor | None = None  # [2] int64
        self._first: Tensor | None = None  # int64, 0 for never

    def add(self, step: int, loss: Tensor, norm: Tensor | None) -> None:
        """Remember one optimizer step.

        Args:
            step: counted from 1.
            loss: 0-d, the sum of this rank's losses.
            norm: 0-d, of the gradient; None where it is not known.
        """
        self._last = step
        broken = [loss.detach().isnan()]
        broken.append(torch.zeros_like(broken[0]) if norm is None else ~norm.detach().isfinite().to(loss.device))
        if self._in_a_row is None:
            self._in_a_row = torch.zeros(2, dtype=torch.int64, device=loss.device)
        first = torch.zeros((), dtype=torch.int64, device=loss.device) if self._first is None else self._first
        self._in_a_row = (self._in_a_row + 1) * torch.stack(broken)
        for count, limit in zip(self._in_a_row, self._limits, strict=True):
            begins = (first == 0) & (count >= limit)
            first = torch.where(begins, step + 1 - count, first)
        self._first = first

    def first_broken_step(self) -> int:
        """The first broken step of any rank; 0 while all is well. One collective; waits for the device."""
        first = 0 if self._first is None else int(self._first.item())
        since = {"steps since the first that is not finite": self._last + 1 - first if first else 0}
        most = int(max(reduce_numbers(since, op="max").values()))
        return self._last + 1 - most if most else 0


def scales_loss(config: RunConfig) -> bool:
    """Whether steps with a gradient that is not finite are left out and tried again with a smaller loss scale."""
    return config.student.dtype == "float16" or uses_autocast(config.deepspeed)


def has_finite_parameters(student: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Whether no parameter of any rank, and no state of its optimizer, holds NaN or infinity.

    An infinite second moment stops a parameter for good, and no loss shows it. One collective; waits for the device.
    """
    states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    finite: Tensor | None = None
    whole = [*student.parameters(), *(value for value in states if isinstance(value, Tensor))]
    for values in (part for tensor in whole for part in inner_tensors(values_here(tensor))):
        if values.numel() and values.is_floating_point():
            here = _finite(values).all()
            finite = here if finite is None else finite & here.to(finite.device)
    broken = finite is not None and not finite.item()
    return not reduce_numbers({"parameters or states that are not finite": float(broken)}, op="max").popitem()[1]


def check_weights(model: nn.Module, side: str, source: str) -> None:
    """Refuse weights that hold NaN or infinity before they are trained on. One collective; waits for the device.

    Args:
        model: loaded, sharded or not.
        side: "student" or "teacher".
        source: where the model comes from, for the message.

    Raises:
        BrokenWeightsError: on all ranks, where any rank holds such a weight.
    """
    broken = [name for name, parameter in model.named_parameters() if not _is_finite(values_here(parameter))]
    anywhere = reduce_numbers({"weights that are not finite": float(len(broken))}, op="max").popitem()[1]
    if anywhere:
        listed = f", such as {broken[0]}" if broken else ""
        raise BrokenWeightsError(
            f"{int(anywhere)} weight(s) of the {side} ({source}) hold NaN or infinity{listed}: load it again, or take "
            "an earlier checkpoint of it"
        )


def _is_finite(values: Tensor) -> bool:
    """Whether there is no NaN or infinity; of quantised weights the scales have them."""
    parts = [] if values.is_meta else [part for part in inner_tensors(values) if part.is_floating_point()]
    return all(bool(_finite(part).all()) for part in parts)


def _finite(values: Tensor) -> Tensor:
    """Of each value, whether it is neither NaN nor infinite; torch cannot ask that of 8-bit floats."""
    return (values.float() if values.itemsize == 1 else values).isfinite()
