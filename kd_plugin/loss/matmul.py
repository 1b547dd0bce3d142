"""Matrix products whose result is not rounded to the precision of the operands.

CUDA multiplies bf16 and fp16 with an fp32 result (`out_dtype`, once that has proven exact). The CPU has no such
product (torch 2.13), so the operands are upcast there: the head's weight once per call, the hidden states chunk by
chunk. The hidden states' gradient is multiplied in the models' precision, unless the processor, or that of another
rank, would only emulate it (`processor.multiplies`).

Where it is the faster library, oneDNN multiplies in fp32 instead of MKL (see `fastest_fp32`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from kd_plugin.loss.buffers import buffer, bytes_of
from kd_plugin.loss.processor import multiplies
from kd_plugin.loss.proven import half_with_fp32_result, is_exact


@functools.cache
def _onednn_is_exact_and_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and without matrix units, whose oneDNN does not round.

    MKL does not use AVX-512 on AMD; oneDNN's fp32 product takes 0.65 to 0.75 times as long there (measured on
    Zen 4, D = 576, V = 49152). With matrix units (AMX) it would round the operands to bf16.
    """
    cpu = torch.cpu.get_capabilities()
    if not (cpu.get("avx512_f") and "AMD" in cpu.get("cpu_name", "")) or cpu.get("amx_tile"):
        return False

    def product(left: Tensor, right: Tensor) -> Tensor:
        with _as_bf16_if_there_is_a_kernel():
            return torch.mm(left, right)

    return is_exact("oneDNN's fp32 product", product, torch.float32, torch.device("cpu"), "MKL multiplies")


class _Precision(Protocol):
    """What torch may round fp32 operands to in one library's products."""

    fp32_precision: str


def _onednn_products() -> _Precision:
    # `torch.backends.mkldnn` is an object in a module's place, of which a type checker sees the module
    return torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def fastest_fp32() -> Iterator[None]:
    """fp32 products of the body by the faster of torch's two CPU libraries, in full fp32 either way.

    torch calls oneDNN for fp32 only when it may round operands to bf16; a processor for which oneDNN has no such
    kernel gets its fp32 kernel. A precision that the user chose stays.
    """
    if _onednn_products().fp32_precision not in ("none", "ieee") or not _onednn_is_exact_and_faster():
        yield
        return
    with _as_bf16_if_there_is_a_kernel():
        yield


@contextmanager
def _as_bf16_if_there_is_a_kernel() -> Iterator[None]:
    """Let oneDNN multiply, which it is asked to do by allowing it to round operands to bf16."""
    products = _onednn_products()
    chosen = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = chosen


class Operand:
    """A head weight `[V, D]` as the right-hand side of `hidden @ weight.T` with a result in `dtype`.

    Args:
        name: of the buffer for its upcast copy, one per head.
        weight: `[V, D]`.
        dtype: of the result.
        rounded: multiply in the weight's own precision and round there; the faster, less exact way.
        hidden_dtype: of the hidden states, if it is another than the weight's; wider ones are not rounded to it.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        dtype: torch.dtype,
        *,
        rounded: bool = False,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.weight = name, weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        self.rounded = rounded and half
        alike = hidden_dtype in (None, weight.dtype)
        self.native = (
            weight.is_cuda and half and alike and dtype == torch.float32 and not self.rounded
        ) and half_with_fp32_result(weight.dtype, weight.device)
        self.wide = weight
        if weight.dtype != dtype and not (self.native or self.rounded):
            rows, width = weight.shape
            self.wide = buffer(f"{name} weight", rows, width, dtype, weight.device).copy_(weight)

    @property
    def held_bytes(self) -> int:
        """Bytes of the wide copy; 0 where there is none."""
        return 0 if self.wide is self.weight else bytes_of(self.wide)

    @property
    def for_gradient(self) -> Tensor:
        """The weight that the logits' gradient is multiplied by: as it is, or wide where half precision is emulated."""
        if self.wide is self.weight or self.weight.is_cuda or multiplies(self.weight.dtype):
            return self.weight
        return self.wide


def mm_into(out: Tensor, hidden: Tensor, operand: Operand) -> None:
    """`out[n, V] = hidden[n, D] @ weight.T` in `out`'s dtype."""
    weight = operand.weight
    if operand.native:
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    elif operand.rounded:
        rows, columns = out.shape
        narrow = buffer("rounded", rows, columns, weight.dtype, weight.device)
        out.copy_(torch.mm(hidden.to(weight.dtype), weight.t(), out=narrow))
    else:
        with fastest_fp32():
            torch.mm(hidden.to(out.dtype), operand.wide.t(), out=out)


def hidden_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """`gradient[n, V] @ weight[V, D]` in their dtype."""
    with fastest_fp32():
        return torch.mm(gradient, weight)


def sum_of_biases(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """`first + second`, `[V]` each; the other where one is None."""
    return second if first is None else first if second is None else first + second


def add_bias(out: Tensor, bias: Tensor | None) -> None:
    """`out[n, V] += bias[V]`, in place."""
    if bias is not None:
        out.add_(bias.to(out.dtype))


def accumulate_outer(
    total: Tensor,  # [V, D] fp32 or fp64
    gradient: Tensor,  # [n, V] in the dtype of `total`
    narrow: Tensor | None,  # [n, V] the same values; read on CUDA only, and converted if not in the dtype of `hidden`
    hidden: Tensor,  # [n, D]
    *,
    first: bool,
) -> None:
    """`total (+)= gradient.T @ hidden`, accumulated in `total`'s dtype.

    `first` overwrites, which saves clearing the buffer and one pass of additions.
    """
    if hidden.is_cuda and hidden.dtype != total.dtype and half_with_fp32_result(hidden.dtype, hidden.device):
        narrow = gradient.to(hidden.dtype) if narrow is None or narrow.dtype != hidden.dtype else narrow
        if first:
            torch.mm(narrow.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, narrow.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        with fastest_fp32():
            if first:
                torch.mm(gradient.t(), hidden.to(total.dtype), out=total)
            else:
                total.addmm_(gradient.t(), hidden.to(total.dtype))
