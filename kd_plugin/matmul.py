"""Matrix products whose result is not rounded to the precision of the operands.

CUDA multiplies bf16 and fp16 with an fp32 result (`out_dtype`). The CPU has no such product (torch 2.13), so
the operands are upcast there: the head's weight once per call, the hidden states chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Operand:
    """A head weight `[V, D]` as the right-hand side of `hidden @ weight.T` with a result in `dtype`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
        self.wide = weight if self.native or weight.dtype == dtype else weight.to(dtype)


def mm_into(out: Tensor, hidden: Tensor, operand: Operand) -> None:
    """`out[n, V] = hidden[n, D] @ weight.T` in `out`'s dtype."""
    if operand.native:
        torch.mm(hidden.to(operand.weight.dtype), operand.weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.to(out.dtype), operand.wide.t(), out=out)


def add_bias(out: Tensor, bias: Tensor | None) -> None:
    """`out[n, V] += bias[V]`, in place."""
    if bias is not None:
        out.add_(bias.to(out.dtype))


def accumulate_outer(
    total: Tensor,  # [V, D] fp32 or fp64
    gradient: Tensor,  # [n, V] in the dtype of `total`
    narrow: Tensor,  # [n, V] the same values in the dtype of `hidden`
    hidden: Tensor,  # [n, D]
    *,
    first: bool,
) -> None:
    """`total (+)= gradient.T @ hidden`, accumulated in `total`'s dtype.

    `first` overwrites, which saves clearing the buffer and one pass of additions.
    """
    if hidden.is_cuda and hidden.dtype != total.dtype:
        if first:
            torch.mm(narrow.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, narrow.t(), hidden, out_dtype=total.dtype, out=total)
    elif first:
        torch.mm(gradient.t(), hidden.to(total.dtype), out=total)
    else:
        total.addmm_(gradient.t(), hidden.to(total.dtype))
