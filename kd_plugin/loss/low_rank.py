"""A low-rank term of the student's logits: `logits = hidden @ weight.T + factor @ up.T`, as a LoRA adapter adds it.

Notable decisions:
- `up @ down`, which is as large as the head, is never formed: the term is one thin product per chunk, and its
  gradients are two more;
- these products run in the precision of the logits whatever the adapter's is: they are r / D of the work, and peft
  keeps adapters in fp32 beside half-precision models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.loss.buffers import bytes_of
from kd_plugin.loss.matmul import fastest_fp32, sum_of_biases


class LowRank(NamedTuple):
    """What an adapter adds to the head's logits; several adapters stand side by side along r."""

    factor: Tensor  # [N, r] scaled; how it comes from the hidden states is autograd's business
    up: Tensor  # [V, r]
    bias: Tensor | None = None  # [V]

    def vocab_slice(self, start: int, stop: int) -> LowRank:
        """The term of the token ids `[start, stop)`."""
        return LowRank(self.factor, self.up[start:stop], None if self.bias is None else self.bias[start:stop])

    def plus(self, bias: Tensor | None) -> Tensor | None:
        """The sum of this term's bias and the head's `bias`; None where there is neither."""
        return sum_of_biases(self.bias, bias)


class LowRankProduct:
    """The term inside the loop over chunks, with its gradients (in the dtype of the logits).

    Args:
        factor: `[N, r]`.
        up: `[V, r]`.
        dtype: of the logits.
        need_factor: whether `grad_factor` `[N, r]` is wanted, otherwise None.
        need_up: whether `grad_up` `[V, r]` is wanted, otherwise None.
    """

    def __init__(self, factor: Tensor, up: Tensor, dtype: torch.dtype, *, need_factor: bool, need_up: bool) -> None:
        self.factor, self.up = factor.to(dtype), up.to(dtype)
        self.grad_factor = factor.new_zeros(factor.shape, dtype=dtype) if need_factor else None
        self.grad_up = up.new_zeros(up.shape, dtype=dtype) if need_up else None

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient of the logits is wanted here."""
        return self.grad_factor is not None or self.grad_up is not None

    @property
    def held_bytes(self) -> int:
        """Bytes of the gradients."""
        return bytes_of(self.grad_factor, self.grad_up)

    def add_to(self, logits: Tensor, factor: Tensor) -> None:
        """`logits[n, V] += factor[n, r] @ up.T`."""
        with fastest_fp32():
            logits.addmm_(factor, self.up.t())

    def factor_gradient(self, gradient: Tensor) -> Tensor:
        """`[n, r]`, given the gradient of the logits `[n, V]`."""
        with fastest_fp32():
            return torch.mm(gradient, self.up)

    def accumulate_up(self, gradient: Tensor, factor: Tensor) -> None:
        """Add what these rows give to `grad_up`, if that is wanted."""
        if self.grad_up is not None:
            with fastest_fp32():
                self.grad_up.addmm_(gradient.t(), factor)

    def take_gradient(self, gradient: Tensor, rows: Tensor | slice) -> None:
        """Both gradients of one chunk of `factor`, given that of its logits `[n, V]`."""
        self.accumulate_up(gradient, self.factor[rows])
        if self.grad_factor is not None:
            self.grad_factor[rows] = self.factor_gradient(gradient)


def low_rank_product(
    factor: Tensor | None, up: Tensor | None, dtype: torch.dtype, needed: list[bool]
) -> LowRankProduct | None:
    """The low-rank term given as the last two inputs of an autograd function, None without one.

    `needed` says of each input of that function, in order, whether its gradient is wanted.
    """
    if factor is None or up is None:
        return None
    return LowRankProduct(factor, up, dtype, need_factor=needed[-2], need_up=needed[-1])
