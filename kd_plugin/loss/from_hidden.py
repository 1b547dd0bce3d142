# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
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
from kd_plugin.loss.chunk_size import chunk_size_on
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.low_rank import LowRank, low_rank_product
from kd_plugin.loss.matmul import Rounding, autocast_dtype
from kd_plugin.loss.output import DistillOutput, Items, LossSums, items_of, normalised, packed, scaled
from kd_plugin.loss.split import Number, Split, check_soft_mask
from kd_plugin.loss.teacher import HeadTeacher, TeacherSource
from kd_plugin.row_kernels import dispatch
from kd_plugin.row_kernels.row_pass import LogitTransform
from kd_plugin.settings.run import DistillConfig


class _Context(Context, Protocol):
    dtypes: list[torch.dtype | None]


class FusedDistill(torch.autograd.Function):
    """The loss of a head: (hidden [N, D], weight [V, D], bias [V] or None, problem) -> (loss sum, statistics sums [K]).

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
        low_rank = low_rank_product(factor, up, chunk_loop.wide_dtype(hidden.dtype), needed)
        result = chunk_loop.run(problem, hidden, weight, bias, chunk_loop.Needed(*needed[:3]), low_rank=low_rank)
        gradients = [result.grad_hidden, result.grad_weight, result.grad_bias]
        if low_rank is not None:
            gradients += [low_rank.grad_factor, low_rank.grad_up]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, factor, up)]
        ctx.mark_non_differentiable(result.sums)
        return problem.loss_of(result.sums), result.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The waiting gradients times that of the loss."""
        grad_loss, _ = grad_outputs
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=False)  # without a low-rank term there are three gradients
        hidden, weight, bias, *low_rank = (scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs)
        return hidden, weight, bias, None, *low_rank


def make_problem(
    call: HeadCall,
    config: DistillConfig,
    hidden: Tensor,
    vocab_size: int,
    *,
    transform: LogitTransform | None = None,
    teacher_size: int | None = None,
) -> chunk_loop.Problem:
    """What is to be computed for `call`, under autocast if that is on now.

    Finds the valid rows unless they are given, which reads the device back.

    Args:
        call: teacher, targets, and how each row counts.
        config: the objective.
        hidden: `[N, D]` of the student.
        vocab_size: V of the student.
        transform: what the student does to its raw logits.
        teacher_size: V', where the call's teacher holds only some columns of it; default: the teacher's own.
    """
    objective, num_rows = make_objective(config), hidden.shape[0]
    rows = _valid_rows(call, config, num_rows, vocab_size)
    num_valid = num_rows if rows is None else rows.shape[0]
    teacher = call.teacher if objective.needs_teacher else None
    teacher_size = None if teacher is None else teacher_size or teacher.vocab_size
    split, targets = _split(call, config)
    if (chunk_size := call.chunk_size) is None:
        chunk_size = chunk_size_on(config, vocab_size, teacher_size, hidden.device, hidden.dtype).rows
    return chunk_loop.Problem(
        objective=objective,
        teacher=teacher,
        targets=targets,
        rows=None if num_valid == num_rows else rows,
        num_rows=num_valid,
        token_weights=call.token_weights,
        split=split,
        chunk_size=chunk_size,
        row_kernel=dispatch.choose(config.row_kernel, hidden.device.type),
        student_transform=transform or LogitTransform(),
        rounding=Rounding(autocast_dtype(hidden.device.type), result=config.logits_dtype == "input"),
        with_gradient=torch.is_grad_enabled(),
    )


def _valid_rows(call: HeadCall, config: DistillConfig, num_rows: int, vocab_size: int) -> Tensor | None:
    """Flat indices of the rows that count, checked; None: all of them."""
    if call.rows is not None:
        checks.loss_rows(call.rows, num_rows)
        return call.rows
    if call.targets is None:
        return None if call.soft_mask is None else call.soft_mask.nonzero().squeeze(1)
    labelled = call.targets != config.ignore_index
    rows = labelled.nonzero().squeeze(1)
    checks.targets_in_vocabulary(call.targets, rows, vocab_size)
    return rows if call.soft_mask is None else (call.soft_mask | labelled).nonzero().squeeze(1)


def _split(call: HeadCall, config: DistillConfig) -> tuple[Split | None, Tensor | None]:
    """Which rows count in which loss, where that differs, and targets of which every one is a token id there."""
    if not call.splits:
        return None, call.targets
    if call.targets is None:
        assert call.soft_mask is not None
        return Split(call.soft_mask, torch.zeros_like(call.soft_mask)), None
    labelled = call.targets != config.ignore_index
    return Split(call.soft_mask, labelled, call.hard_factor), torch.where(labelled, call.targets, 0)


def loss_sums(
    problem: chunk_loop.Problem,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    low_rank: LowRank | None = None,
) -> LossSums:
    """Sums over the valid rows, before any normalisation; what the head and `distill_loss` share."""
    if low_rank is None:
        loss_sum, statistics = FusedDistill.apply(hidden, weight, bias, problem)
    else:
        parts = (low_rank.plus(bias), problem, low_rank.factor, low_rank.up)
        loss_sum, statistics = FusedDistill.apply(hidden, weight, *parts)
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


def counted_call(
    teacher: TeacherSource | None,
    targets: Tensor | None,
    hidden: Tensor,
    config: DistillConfig,
    token_weights: Tensor | None,
    num_items: Number | None,
    soft_mask: Tensor | None,
    soft_items: Number | None,
) -> tuple[HeadCall, Items | None]:
    """The call of a function that takes these arguments, checked, and what its sums are divided by."""
    checks.token_weights(token_weights, hidden)
    check_soft_mask(soft_mask, targets, hidden.shape[:-1], config)
    call = HeadCall(teacher, targets, token_weights=token_weights, soft_mask=soft_mask)
    items = items_of(soft_mask, targets, config.ignore_index, hidden.dtype, num_items, soft_items)
    if call.splits and items is not None:
        call.hard_factor = items.factor
    return call, items


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
    soft_mask: Tensor | None = None,
    soft_items: int | float | Tensor | None = None,
) -> DistillOutput:
    """Distillation loss of aligned rows, without ever holding `[tokens, vocab]` logits.

    Args:
        student_hidden: `[..., D]`, any float dtype; gets a gradient if it requires one. Autocast rounds it, no logits.
        student_weight: `[V, D]`; likewise.
        teacher_hidden: `[..., E]`, the same leading shape; never gets a gradient. None if `soft_weight` is 0.
        teacher_weight: `[V', E]`. The soft loss is over the first min(V, V') token ids of both, each softmax of its
            own; the hard loss over all V. To the metrics the teacher's probability of a token that it lacks is 0.
        targets: `[...]` int64, the label of each row itself (already shifted), any of the V token ids;
            `config.ignore_index` skips a row. None with `hard_weight=0`: every row counts.
        config: the objective.
        student_bias, teacher_bias: `[V]` and `[V']`.
        token_weights: `[...]`, multiplies each row's loss and gradient.
        num_items: divides the sums over rows, 0 or more (0 counts as 1); default: the valid rows of this call.
        soft_mask: bool `[...]`, the rows of the soft loss and the metrics, labelled or not (`soft_on: all`); the hard
            loss stays on labelled ones, and each is divided by its own rows. None: both are on the labelled rows.
        soft_items: with `soft_mask`: divides the soft loss, and `num_items` the hard loss alone.

    Raises:
        ValueError: what does not fit, no floats, targets outside the student's vocabulary, DTensors, or weights that
            are elsewhere (partitioned by ZeRO-3, on the meta device); the message says what to do instead.
    """
    teacher = checked_teacher(
        student_hidden, student_weight, teacher_hidden, teacher_weight, targets, student_bias, teacher_bias, config
    )
    counted = (token_weights, num_items, soft_mask, soft_items)
    call, items = counted_call(teacher, targets, student_hidden, config, *counted)
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    problem = make_problem(call, config, hidden, student_weight.shape[0])
    return normalised(loss_sums(problem, hidden, student_weight, student_bias), items)
