"""Matrix products whose result is not rounded to the precision of the operands.

CUDA multiplies bf16 and fp16 with an fp32 result (`out_dtype`, once that has proven exact). On a CPU torch has no such
operator (2.13), though on some processors a kernel for bf16 (`half_products`). Elsewhere the operands are upcast: the
head's weight once per call, the hidden states chunk by chunk. The hidden states' gradient is multiplied in the models'
precision, unless the processor, or that of another rank, would only emulate it (`processor.multiplies`).

Under autocast the operands of all products are rounded to its dtype, as it would, and no result is: on CUDA by the same
products, on the CPU by fp32 products of the rounded operands. What is added to the logits (biases, low-rank terms) is
not rounded.

Where it is the faster library, oneDNN multiplies in fp32 instead of MKL (see `fastest_fp32`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kd_plugin.loss.buffers import buffer, bytes_of
from kd_plugin.loss.half_products import PackedWeight, is_proven
from kd_plugin.loss.processor import HALVES, multiplies
from kd_plugin.loss.proven import half_with_fp32_result, is_exact

_PACKED_NUMEL = 2**20  # below, the threads that multiply blocks cost more than they save
_BLOCK_NUMEL = 2**18  # 1 MiB in fp32: what is rounded on the way stays in a core's cache


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


class Rounding(NamedTuple):
    """What the products of hidden states and heads may round."""

    operands: torch.dtype | None = None
    """The half precision that both operands are rounded to, because autocast would; fp64 is left alone, as it does."""
    result: bool = False
    """Round logits to the precision of the operands: the faster, less exact way."""


EXACT = Rounding()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The half precision that autocast now gives the operands of products on such a device; None without it."""
    if not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype in HALVES.values() else None


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


def _packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether this processor multiplies a bf16 head with an fp32 result, and it is large enough to be worth a copy."""
    fits = dtype == torch.float32 and not weight.is_cuda and weight.shape[1] % 2 == 0
    return fits and weight.numel() >= _PACKED_NUMEL and multiplies(torch.bfloat16) and is_proven()


class Operand:
    """A head weight `[V, D]` as the right-hand side of `hidden @ weight.T` with a result in `dtype`.

    Args:
        name: of the buffer for its upcast copy, one per head.
        weight: `[V, D]`.
        dtype: of the result.
        rounding: what may be rounded; nothing by default.
        hidden_dtype: of the hidden states, if it is another than the weight's; wider ones are not rounded to it.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        dtype: torch.dtype,
        rounding: Rounding = EXACT,
        *,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self._given = name, weight
        dtypes = {weight.dtype, hidden_dtype or weight.dtype}
        self.autocast = None if torch.float64 in dtypes or dtypes == {rounding.operands} else rounding.operands
        """What both operands are rounded to; None where that changes neither."""
        product = self.autocast or weight.dtype
        half = product in HALVES.values()
        self.rounded = rounding.result and half
        alike = self.autocast is not None or len(dtypes) == 1
        self.native = (
            weight.is_cuda and half and alike and dtype == torch.float32 and not self.rounded
        ) and half_with_fp32_result(product, weight.device)
        as_is = self.native or self.rounded
        self.weight = self._copy(weight, product) if as_is and weight.dtype != product else weight
        self.wide = self.weight
        self.packed: PackedWeight | None = None
        if not as_is and dtypes == {torch.bfloat16} and _packs(weight, dtype):
            self.packed = PackedWeight(name, weight)
        elif not as_is and (weight.dtype != dtype or self.autocast is not None):
            self.wide = self._copy(weight, dtype)

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, rounded as autocast rounds it."""
        rows, width = weight.shape
        copy = buffer(f"{self.name} weight", rows, width, dtype, weight.device)
        if self.autocast in (None, dtype, weight.dtype):
            return copy.copy_(weight)
        block = max(1, _BLOCK_NUMEL // width)  # so that no third copy exists
        for part, given in zip(copy.split(block), weight.split(block), strict=True):
            part.copy_(given.to(self.autocast))
        return copy

    @property
    def held_bytes(self) -> int:
        """Bytes of the copy that is multiplied; 0 where there is none."""
        if self.packed is not None:
            return bytes_of(self.packed.packed)
        return 0 if self.wide is self._given else bytes_of(self.wide)

    @property
    def for_gradient(self) -> Tensor:
        """The weight that the logits' gradient is multiplied by: as it is, or wide where half precision is emulated.

        Under autocast it is the one that made the logits.
        """
        if self.wide is self.weight or self.autocast is not None:
            return self.wide
        return self.weight if self.weight.is_cuda or multiplies(self.weight.dtype) else self.wide

    @property
    def hidden_gradient_dtype(self) -> torch.dtype | None:
        """Of the product with `for_gradient`; None: that of its operands, as they are halves outside of autocast."""
        return torch.float32 if self.native and self.autocast is not None else None

    def cast(self, hidden: Tensor) -> Tensor:
        """`hidden` as autocast rounds it; as it is without."""
        return hidden if self.autocast is None else hidden.to(self.autocast)

    @property
    def rounds_gradient(self) -> bool:
        """Whether autocast's rounding of the logits' gradient is left to do, because a wide weight multiplies it."""
        return self.autocast is not None and self.for_gradient.dtype != self.autocast


def mm_into(out: Tensor, hidden: Tensor, operand: Operand) -> None:
    """`out[n, V] = hidden[n, D] @ weight.T` in `out`'s dtype."""
    weight = operand.weight
    if operand.native:
        torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=out.dtype, out=out)
    elif operand.rounded:
        rows, columns = out.shape
        narrow = buffer("rounded", rows, columns, weight.dtype, weight.device)
        out.copy_(torch.mm(hidden.to(weight.dtype), weight.t(), out=narrow))
    elif operand.packed is not None:
        operand.packed.multiply_into(out, hidden)
    else:
        with fastest_fp32():
            torch.mm(operand.cast(hidden).to(out.dtype), operand.wide.t(), out=out)


def hidden_gradient(gradient: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`gradient[n, V] @ weight[V, D]` in their dtype, or in `dtype` where that has proven exact."""
    if dtype is not None:
        return torch.mm(gradient, weight, out_dtype=dtype)
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
