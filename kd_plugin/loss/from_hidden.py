"""Hidden states in, distillation loss and its gradients out.

Notable decisions:
- gradients are computed in forward, in closed form, and kept un-normalised; backward multiplies them once by
  `grad_output` (which carries 1 / num_items, the loss scale and the accumulation factor), so that fp16 does not
  underflow and every gradient is scaled alike;
- no collective is called here, and nothing is read back from the device when the valid rows are given.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kd_plugin.divergences.objective import make_objective
from kd_plugin.loss import checks, chunk_loop
from kd_plugin.loss.autograd import Context, once_differentiable
from kd_plugin.loss.chunk_size import chunk_rows
from kd_plugin.loss.low_rank import LowRank, low_rank_product
from kd_plugin.loss.output import DistillOutput, LossSums, normalised, packed, scaled
from kd_plugin.loss.teacher import HeadTeacher, TeacherSource
from kd_plugin.row_kernels import dispatch
from kd_plugin.row_kernels.dispatch import LogitTransform
from kd_plugin.settings.run import DistillConfig


class _Context(Context, Protocol):
    dtypes: list[torch.dtype | None]


class FusedDistill(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], bias [V] or None, problem) -> (loss sum, statistics sums [K]).

    A low-rank term follows as (factor [N, r], up [V, r]).
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: chunk_loop.Problem,
        factor: Tensor | None = None,
        up: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All the work; gradients wait in `ctx`."""
        needed = [need and problem.with_gradient for need in ctx.needs_input_grad]
        need_hidden, need_weight, need_bias = needed[:3]
        low_rank = low_rank_product(factor, up, chunk_loop.wide_dtype(hidden.dtype), needed)
        result = chunk_loop.run(
            problem,
            hidden,
            weight,
            bias,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
            low_rank=low_rank,
        )
        gradients = [result.grad_hidden, result.grad_weight, result.grad_bias]
        if low_rank is not None:
            gradients += [low_rank.grad_factor, low_rank.grad_up]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, factor, up)]
        ctx.mark_non_differentiable(result.sums)
        objective = problem.objective
        loss_sum = objective.soft_weight * result.sums[0] + objective.hard_weight * result.sums[1]
        return loss_sum, result.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The waiting gradients times that of the loss."""
        grad_loss, _ = grad_outputs
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=False)  # without a low-rank term there are three gradients
        hidden, weight, bias, *low_rank = (scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs)
        return hidden, weight, bias, None, *low_rank


def make_problem(
    flat: Tensor,  # [N, D]
    student_size: int,  # V
    teacher: TeacherSource | None,
    targets: Tensor | None,  # [N]
    config: DistillConfig,
    *,
    transform: LogitTransform | None = None,
    token_weights: Tensor | None = None,  # [N]
    rows: Tensor | None = None,  # [n]
    teacher_size: int | None = None,  # V', where `teacher` holds a part of the columns
) -> chunk_loop.Problem:
    """What is to be computed. Finds the valid rows unless they are given, which reads the device back."""
    objective = make_objective(config)
    if rows is None and targets is not None:
        valid = targets != config.ignore_index
        rows = valid.nonzero().squeeze(1)
        checks.targets_in_vocabulary(targets, rows, student_size)
    elif rows is not None:
        checks.loss_rows(rows, flat.shape[0])
    num_rows = flat.shape[0] if rows is None else rows.shape[0]
    teacher = teacher if objective.needs_teacher else None
    if teacher is not None and teacher_size is None:
        teacher_size = teacher.vocab_size
    return chunk_loop.Problem(
        objective=objective,
        teacher=teacher,
        targets=targets,
        rows=None if num_rows == flat.shape[0] else rows,
        num_rows=num_rows,
        token_weights=token_weights,
        chunk_size=chunk_rows(config, student_size, None if teacher is None else teacher_size),
        row_kernel=dispatch.choose(config.row_kernel, flat.device.type),
        student_transform=transform or LogitTransform(),
        rounded_logits=config.logits_dtype == "input",
        with_gradient=torch.is_grad_enabled(),
    )


def loss_sums(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    teacher: TeacherSource | None,
    targets: Tensor | None,  # [...] int64
    config: DistillConfig,
    *,
    transform: LogitTransform | None = None,
    token_weights: Tensor | None = None,  # [...]
    rows: Tensor | None = None,  # [n] flat indices of the valid rows, counted on the host
    low_rank: LowRank | None = None,
) -> LossSums:
    """Sums over the valid rows, before any normalisation; what the head and `distill_loss` share."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    problem = make_problem(
        flat,
        weight.shape[0],
        teacher,
        None if targets is None else targets.reshape(-1),
        config,
        transform=transform,
        token_weights=None if token_weights is None else token_weights.reshape(-1),
        rows=rows,
    )
    if low_rank is None:
        loss_sum, statistics = FusedDistill.apply(flat, weight, bias, problem)
    else:
        parts = (low_rank.plus(bias), problem, low_rank.factor, low_rank.up)
        loss_sum, statistics = FusedDistill.apply(flat, weight, *parts)
    return packed(loss_sum, statistics, problem)


def checked_teacher(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    config: DistillConfig,
) -> HeadTeacher | None:
    """The teacher of a loss on hidden states, once all of its arguments fit; None if it needs none."""
    checks.loss_inputs(
        student_hidden, student_weight, teacher_hidden, teacher_weight, targets, student_bias, teacher_bias, config
    )
    if not config.soft_weight:
        return None
    assert teacher_hidden is not None and teacher_weight is not None
    return HeadTeacher(teacher_hidden, teacher_weight, teacher_bias)


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    *,
    config: DistillConfig,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> DistillOutput:
    """Distillation loss of aligned rows, without ever holding `[tokens, vocab]` logits.

    Args:
        student_hidden: `[..., D]`, any float dtype; gets a gradient if it requires one.
        student_weight: `[V, D]`; likewise.
        teacher_hidden: `[..., E]`, the same leading shape; never gets a gradient. None if `soft_weight` is 0.
        teacher_weight: `[V', E]`. The soft loss is over the first min(V, V') rows of both, each softmax of its own;
            the hard loss over all V. To kl_t1, top1_agreement and acceptance_rate the teacher's probability of a token
            that it lacks is 0 (README, "Divergences").
        targets: `[...]` int64, the label of each row itself (already shifted), any of the V token ids;
            `config.ignore_index` skips a row. None with `hard_weight=0`: every row counts.
        config: the objective.
        student_bias: `[V]`.
        teacher_bias: `[V']`.
        token_weights: `[...]`, multiplies each row's loss and gradient.
        num_items: divides the sums over rows, 0 or more (0 counts as 1); default: the valid rows of this call.

    Raises:
        ValueError: shapes that do not fit, tensors that are no floats, targets outside the student's vocabulary,
            DTensors, or weights that are elsewhere (partitioned by ZeRO-3, on the meta device); the message says
            what to do instead.
    """
    teacher = checked_teacher(
        student_hidden, student_weight, teacher_hidden, teacher_weight, targets, student_bias, teacher_bias, config
    )
    checks.token_weights(token_weights, student_hidden)
    sums = loss_sums(
        student_hidden, student_weight, student_bias, teacher, targets, config, token_weights=token_weights
    )
    return normalised(sums, num_items)
