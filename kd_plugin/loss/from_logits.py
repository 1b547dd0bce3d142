# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""The same objective for logits that already exist: listwise ranking, tests, models without an lm_head."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_plugin.divergences.objective import make_objective
from kd_plugin.loss import checks, reference
from kd_plugin.loss.autograd import Context, once_differentiable
from kd_plugin.loss.chunk_loop import wide_dtype
from kd_plugin.loss.chunk_size import chunk_size_on, teacher_columns
from kd_plugin.loss.output import DistillOutput, LossSums, items_of, normalised, scaled
from kd_plugin.row_kernels import dispatch
from kd_plugin.row_kernels.row_pass import RowSpec, subtract_labels
from kd_plugin.row_kernels.statistics import STATISTICS
from kd_plugin.settings.run import DistillConfig


class _LogitsLoss(torch.autograd.Function):
    """(student_logits [N, V], teacher_logits [N, V'], ...) -> (loss sum, statistics sums)."""

    @staticmethod
    def forward(
        ctx: Context,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor | None,
        rows: Tensor,
        config: DistillConfig,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        objective, vocab_size = make_objective(config), student.shape[1]
        teacher_size = None if teacher is None else teacher.shape[1]
        spec = RowSpec(objective, with_gradient=with_gradient and ctx.needs_input_grad[0])
        kernel = dispatch.choose(config.row_kernel, student.device.type)
        wide = wide_dtype(student.dtype)
        gradient = torch.zeros_like(student) if spec.with_gradient else None
        sums = student.new_zeros(len(STATISTICS), dtype=wide)
        chunk = chunk_size_on(config, vocab_size, teacher_size, student.device, student.dtype).rows
        for piece in rows.split(chunk) if rows.numel() else ():
            logits, others = _taken(student, piece, vocab_size, wide), None
            if teacher is not None:
                others = _taken(teacher, piece, teacher_columns(objective, vocab_size, teacher.shape[1]), wide)
            labels = target_logits = None
            if objective.hard_weight and targets is not None:
                labels = targets[piece, None]
                target_logits = logits[: piece.numel()].gather(1, labels)
            sums += dispatch.run(kernel, spec, piece.numel(), logits, others, target_logits, None).sum(0)
            logits = logits[: piece.numel()]
            if gradient is None:
                continue
            if labels is not None and target_logits is not None:
                subtract_labels(spec, logits, labels, target_logits, None)
            gradient[piece] = logits.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return objective.weighted(sums[0], sums[1]), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, _ = grad_outputs
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, grad_loss, gradient.dtype), None, None, None, None, None


def _taken(logits: Tensor, rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`rows` of `logits`, their first `columns`, in `dtype`; at least two rows (see `dispatch.run`)."""
    taken = logits.new_empty(max(rows.numel(), 2), columns, dtype=dtype)
    taken[: rows.numel()] = logits[rows, :columns]
    return taken


def distill_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None = None,
    *,
    config: DistillConfig,
    detach_teacher: bool = True,
    num_items: int | float | Tensor | None = None,
) -> DistillOutput:
    """Distillation loss of logits `[..., V]` and `[..., V']`, of which each loss takes what `distill_loss` says.

    Args:
        student_logits: any float dtype; gets a gradient if it requires one.
        teacher_logits: the same leading shape; None if `soft_weight` is 0.
        targets: `[...]` int64; `config.ignore_index` skips a row. None with `hard_weight=0`: every row counts.
        config: the objective.
        detach_teacher: False lets the gradient into the teacher's logits too (e.g. a ranker trained jointly);
            computed by autograd on the dense logits, which exist anyway.
        num_items: divides the sums over rows; 0 or more (0 counts as 1); default: the valid rows of this call.

    Raises:
        ValueError: shapes that do not fit, logits that are no floats, targets outside the student's vocabulary, or
            `soft_on: all` with targets.
    """
    if not detach_teacher:
        return reference.distill_logits(
            student_logits, teacher_logits, targets, config=config, detach_teacher=False, num_items=num_items
        )
    checks.distill_config(config)
    _refuse_soft_on_all(targets, config)
    checks.logits_inputs(student_logits, teacher_logits, targets, config)
    student = student_logits.reshape(-1, student_logits.shape[-1])
    teacher = None
    if config.soft_weight and teacher_logits is not None:
        teacher = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    objective = make_objective(config)
    rows = torch.arange(student.shape[0], device=student.device)
    if targets is not None:
        targets = targets.reshape(-1)
        rows = rows[targets != config.ignore_index]
        checks.targets_in_vocabulary(targets, rows, student.shape[1])
    loss_sum, statistics = _LogitsLoss.apply(student, teacher, targets, rows, config, torch.is_grad_enabled())
    num_valid = torch.full((), rows.numel(), dtype=torch.int64, device=student.device)
    items = items_of(None, targets, config.ignore_index, student.dtype, num_items, None)
    return normalised(LossSums(loss_sum, statistics, num_valid, objective.measured), items)


def _refuse_soft_on_all(targets: Tensor | None, config: DistillConfig) -> None:
    if config.soft_everywhere and targets is not None:
        raise ValueError(
            "soft_on is all, but distill_logits has both losses on the rows with a label: set soft_on=trained, or call "
            "distill_loss with soft_mask, or distill_logits once for each loss"
        )
