"""Which half precisions the processor multiplies by itself, told by its instruction sets.

Never by a stopwatch: what is decided here changes the last bits of gradients, and a busy machine would decide
otherwise than an idle one. All ranks of a job decide alike (`settle`), since one of them may be an older machine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

__all__ = ["HALVES", "describe", "emulated_here", "instructions", "multiplies", "settle", "wanted"]

logger = logging.getLogger(__name__)

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# As torch.cpu.get_capabilities() calls them: x86's, then ARM's. Without them oneDNN converts every block to float32
# or torch multiplies element by element (Zen 3, torch 2.13: 4 to 200 times as long as float32, by shape). ARM's
# fp16_arith is not among them: torch has no matrix product for it.
_PRODUCTS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}

_emulated_elsewhere: set[torch.dtype] = set()
"""Half precisions that another rank's processor lacks; of the process group that is there now."""


def instructions(dtype: torch.dtype) -> str | None:
    """The instruction set by which this processor multiplies matrices of `dtype`; None where it has none."""
    if not torch.backends.mkldnn.is_available():  # which alone uses them
        return None
    processor = torch.cpu.get_capabilities()
    return next((name for name in _PRODUCTS.get(dtype, ()) if processor.get(name)), None)


def wanted(dtype: torch.dtype) -> str:
    """The instruction sets of which one would do for products of `dtype`, for messages."""
    return ", ".join(_PRODUCTS.get(dtype, ()))


def multiplies(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are left in it: this processor and, after `settle`, every rank's has them."""
    if dtype not in _PRODUCTS:
        return True
    chosen = describe(dtype)
    _say(dtype, chosen)
    return not chosen.startswith("in float32")


def describe(dtype: torch.dtype) -> str:
    """In what products of the half precision `dtype` are computed, and why."""
    instruction_set = instructions(dtype)
    if instruction_set is None:
        return f"in float32 (the processor has none of {wanted(dtype)})"
    if dist.is_available() and dist.is_initialized() and dtype in _emulated_elsewhere:
        return "in float32 (another rank's processor lacks it)"
    return f"in {str(dtype).removeprefix('torch.')} (the processor has {instruction_set})"


@functools.cache
def _say(dtype: torch.dtype, chosen: str) -> None:
    """Log what was chosen, once."""
    logger.info("%s products: %s", str(dtype).removeprefix("torch."), chosen)


def emulated_here() -> dict[str, bool]:
    """For each half precision, whether this processor lacks it. What ranks tell each other before `settle`."""
    return {name: instructions(dtype) is None for name, dtype in HALVES.items()}


def settle(everyone: Iterable[Mapping[str, float]]) -> None:
    """Take the wider way wherever any rank must: `everyone` holds each rank's `emulated_here()`, or their maximum.

    It holds for as long as the process group does, or until ranks settle again.
    """
    ranks = list(everyone)
    _emulated_elsewhere.clear()
    _emulated_elsewhere.update(dtype for name, dtype in HALVES.items() if any(rank[name] for rank in ranks))
