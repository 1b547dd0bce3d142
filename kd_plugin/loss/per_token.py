# pyright: strict
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnnecessaryComparison=false
"""The same loss, one value per token."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kd_plugin.loss import chunk_loop
from kd_plugin.loss.autograd import Context, once_differentiable
from kd_plugin.loss.from_hidden import checked_teacher, make_problem
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.output import scaled
from kd_plugin.loss.split import check_soft_mask
from kd_plugin.settings.run import DistillConfig


class TokenLosses(NamedTuple):
    """Losses token by token, each in the targets' shape; 0 where the label is `ignore_index`, or a mask says so.

    Only `loss` is differentiable.
    """

    loss: Tensor
    soft_loss: Tensor
    hard_loss: Tensor


class _Context(Context, Protocol):
    problem: chunk_loop.Problem


class _TokenLosses(torch.autograd.Function):
    """Losses without gradients in forward; backward runs the chunks again, each row weighted by its gradient.

    A weight's gradient is a sum over rows, so it cannot be computed before the rows' factors are known.
    """

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: chunk_loop.Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = chunk_loop.run(problem, hidden, weight, bias, chunk_loop.Needed(), keep_rows=True)
        assert result.per_row is not None
        soft, hard = hidden.new_zeros(2, hidden.shape[0], dtype=result.sums.dtype)
        rows = slice(None) if problem.rows is None else problem.rows
        soft[rows], hard[rows] = result.per_row[:, 0], result.per_row[:, 1]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.problem = problem
        ctx.mark_non_differentiable(soft, hard)
        return problem.objective.weighted(soft, hard), soft, hard

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, _, _ = grad_outputs
        hidden, weight, bias = ctx.saved_tensors
        # Factors such as 1 / tokens come back at the end, in fp32: in fp16 they would leave nothing of a gradient.
        largest = grad_loss.abs().max() if grad_loss.numel() else grad_loss.new_ones(())
        largest = largest.clamp_min(torch.finfo(grad_loss.dtype).tiny)
        needed = chunk_loop.Needed(*ctx.needs_input_grad[:3])
        result = chunk_loop.run(ctx.problem.weighted(grad_loss / largest), hidden, weight, bias, needed)
        gradients = (result.grad_hidden, result.grad_weight, result.grad_bias)
        dtypes = (None if x is None else x.dtype for x in (hidden, weight, bias))
        return (*(scaled(g, largest, dtype) for g, dtype in zip(gradients, dtypes, strict=True)), None)


def distill_loss_per_token(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    *,
    config: DistillConfig,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    soft_mask: Tensor | None = None,
) -> TokenLosses:
    """`distill_loss` with `reduction="none"`: losses `[...]`, differentiable token by token, still in chunks.

    Arguments and errors as `distill_loss`. Backward recomputes the logits (one more product per model), because
    only then is each token's factor known; `distill_loss(token_weights=...)` is cheaper where it is known before.
    """
    teacher = checked_teacher(
        student_hidden, student_weight, teacher_hidden, teacher_weight, targets, student_bias, teacher_bias, config
    )
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    check_soft_mask(soft_mask, targets, student_hidden.shape[:-1], config)
    problem = make_problem(HeadCall(teacher, targets, soft_mask=soft_mask), config, flat, student_weight.shape[0])
    losses = _TokenLosses.apply(flat, student_weight, student_bias, problem)
    return TokenLosses(*(values.view(student_hidden.shape[:-1]) for values in losses))
