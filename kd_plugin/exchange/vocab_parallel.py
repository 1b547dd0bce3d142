"""The loss with the vocabulary cut over the ranks: statistics cross the wire, no weights and no logits.

Data-parallel ranks hold different tokens, and each may hold a vocabulary slice of the heads (FSDP2 leaves it exactly
that). Per chunk, the ranks gather each other's hidden states, multiply them with their own slices of both heads,
exchange a few numbers per token (maxima, sums of exponentials, some divergences' sums), and reduce-scatter the
hidden states' gradient. The gradient of a rank's slice of the weight needs nobody else. No rank ever holds a whole
head, its gradient, or a whole row of logits.

A chunk takes three collectives: the gather, which runs while the chunk before is computed; one round of
statistics, two for divergences whose gradient reads sums; and the reduce-scatter, beside the weight's gradient.

Every chunk contains collectives, so all ranks agree on the number of chunks first; short ranks pad with rows of
weight zero. Method: the loss-parallel cross-entropy of Megatron-LM (arXiv:1909.08053), over data-parallel ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kd_plugin.distributed.collectives import all_gather, all_reduce, reduce_scatter
from kd_plugin.distributed.torch_internals import assert_on_device
from kd_plugin.distributed.vocab_slice import VocabSlice
from kd_plugin.exchange.row_gather import RowGather
from kd_plugin.loss.autograd import Context, once_differentiable
from kd_plugin.loss.buffers import buffer, bytes_of
from kd_plugin.loss.chunk_loop import Problem, foreign_labels, wide_dtype
from kd_plugin.loss.chunk_plan import agreed_plan
from kd_plugin.loss.chunk_size import dense_bytes
from kd_plugin.loss.low_rank import LowRankProduct, low_rank_product
from kd_plugin.loss.matmul import Operand, accumulate_outer, add_bias, hidden_gradient, mm_into
from kd_plugin.loss.output import scaled
from kd_plugin.loss.split import row_weights
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.row_kernels import sharded_dispatch
from kd_plugin.row_kernels.row_pass import subtract_labels
from kd_plugin.row_kernels.sharded_row_pass import merge_moments
from kd_plugin.row_kernels.statistics import LOSSES, STATISTICS


class _SlicedLoop:
    """What the chunks of one call share. All tensors of a chunk have `W * C` rows, of all ranks in turn."""

    def __init__(
        self,
        problem: Problem,
        vocab_slice: VocabSlice,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: LowRankProduct | None,
        grads: bool,
    ) -> None:
        teacher = problem.teacher
        assert teacher is None or isinstance(teacher, HeadTeacher)
        self.problem, self.vocab_slice = problem, vocab_slice
        self.bias, self.teacher, self.low_rank = bias, teacher, low_rank
        self.weight = weight if problem.rounding.operands else weight.to(hidden.dtype)
        self.dtype = wide_dtype(hidden.dtype)
        self.spec = problem.row_spec(with_gradient=grads)
        self.plan = agreed_plan(problem.rows, problem.num_rows, problem.chunk_size, vocab_slice.group, hidden.device)
        problem.group_rows = self.plan.group_rows
        self.gather = RowGather(self.plan, vocab_slice.group, self._rows_to_send(hidden), "the hidden states")
        self.operand = Operand("student", self.weight, self.dtype, problem.rounding, hidden_dtype=hidden.dtype)
        if teacher is not None:
            teacher.prepare(None, vocab_slice.teacher_columns, self.dtype, problem.rounding)
        count = len(STATISTICS)
        self.own = hidden.new_zeros(count, dtype=self.dtype)
        """Sums over this rank's rows of the statistics that every rank has of them whole."""
        self.parts = hidden.new_zeros(vocab_slice.world_size, count, dtype=self.dtype)
        """What this rank's columns add to the sums of each rank."""

    def _rows_to_send(self, hidden: Tensor) -> dict[str, Tensor]:
        weights = row_weights(self.problem.token_weights, self.problem.split, slice(None), self.dtype)
        ones = hidden.new_ones(hidden.shape[0], 1, dtype=self.dtype)  # 0 where a short rank is padded
        both = [ones if given is None else given for given in (weights.soft, weights.measured)]
        rows = {"weights": torch.cat(both, -1)}
        if weights.hard is not None and weights.hard_value is not None:
            rows["hard_weights"] = torch.cat([weights.hard, weights.hard_value], -1)
        if self.problem.objective.hard_weight:
            rows["targets"] = self._own_labels()[:, None]
        rows["student"] = hidden
        if self.low_rank is not None:
            rows["factor"] = self.low_rank.factor
        return rows if self.teacher is None else rows | {"teacher": self.teacher.hidden}

    def _own_labels(self) -> Tensor:
        """Labels `[N]` of this rank's rows; an id that no rank holds is refused: it would pass for a logit of 0."""
        labels, size = self.problem.targets, self.vocab_slice.sizes.student
        assert labels is not None
        counted = labels if self.problem.rows is None else labels[self.problem.rows]
        foreign = (counted < 0) | (counted >= size)
        if labels.is_cuda:
            assert_on_device(~foreign.any(), foreign_labels(size, "on this rank"))
        elif foreign.any():
            raise ValueError(foreign_labels(size, f"such as {int(counted[foreign][0])}"))
        split = self.problem.split
        return labels if split is None else torch.where(split.hard, labels, -1)  # which is on no rank

    def logits(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Both models' logits of this rank's columns, `[W * C, V_r]` and `[W * C, V'_r]`."""
        rows, device = given["student"].shape[0], self.weight.device
        student = buffer("student", rows, self.vocab_slice.size, self.dtype, device)
        mm_into(student, given["student"], self.operand)
        add_bias(student, self.bias)
        if self.low_rank is not None:
            self.low_rank.add_to(student, given["factor"])
        if self.teacher is None:
            return student, None
        teacher = buffer("teacher", rows, self.vocab_slice.teacher_columns, self.dtype, device)
        self.teacher.multiply_into(teacher, given["teacher"])
        return student, teacher

    def labels(self, targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three numbers of every row, each `[W * C, 1]`, about its label.

        Its column on this rank (0 where it is not here), whether it is here, and its logit (0 where it is not).
        """
        here = (targets >= self.vocab_slice.start) & (targets < self.vocab_slice.stop)
        columns = torch.where(here, targets - self.vocab_slice.start, 0)
        own = logits.gather(1, columns) if self.vocab_slice.size else logits.new_zeros(columns.shape)
        return columns, here, torch.where(here, own, 0.0)

    def run(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        """Chunk `index` -> what all ranks sent of it, and the gradient of its logits `[W * C, V_r]`.

        What it adds to the statistics is added to `own` and `parts`.
        """
        given = self.gather.take(index)
        kernel, spec, vocab_slice = self.problem.row_kernel, self.spec, self.vocab_slice
        student, teacher = self.logits(given)
        weights, valid = given["weights"].split(1, dim=-1)
        of_labels, hard = given["hard_weights"].split(1, dim=-1) if "hard_weights" in given else (weights, weights)
        hard_weights = of_labels if "hard_weights" in given else None
        args = (kernel, spec, vocab_slice.sizes, student, teacher)
        moments = sharded_dispatch.moments(*args)
        labels = self.labels(given["targets"], student) if "targets" in given else None
        if labels is not None:
            moments = torch.cat([moments, labels[2]], -1)
        merged = merge_moments(
            spec, vocab_slice.sizes, all_gather(moments[None], vocab_slice.group, "the softmaxes' statistics")
        )
        sums = sharded_dispatch.sums(*args, merged)
        if sums.shape[1]:
            all_reduce(sums, vocab_slice.group, "the divergence's sums")
        statistics = sharded_dispatch.finish(*args, weights, merged, sums, hard_weights)
        if labels is not None and spec.with_gradient and vocab_slice.size:
            columns, here, label_logits = labels
            subtract_labels(spec, student, columns, label_logits, of_labels * here)
        self._add(statistics, torch.cat([weights, hard], -1), valid)
        return given, student

    def _add(self, statistics: Tensor, weights: Tensor, valid: Tensor) -> None:
        losses, count, chunk = len(LOSSES), self.own.numel(), self.plan.chunk
        factors = torch.cat([weights, valid.expand(-1, count - losses)], -1)
        whole, parts = statistics.split(count, dim=-1)
        mine = slice(self.vocab_slice.rank * chunk, (self.vocab_slice.rank + 1) * chunk)
        self.own += (whole[mine] * factors[mine]).sum(0)
        self.parts += (parts * factors).view(-1, chunk, count).sum(1)

    def total(self) -> Tensor:
        """Statistics `[len(STATISTICS)]` of this rank's rows."""
        return self.own + reduce_scatter(self.parts, self.vocab_slice.group, "the statistics")[0]

    def take_low_rank_gradient(self, index: int, gradient: Tensor, factor: Tensor) -> None:
        """Add the gradient of the adapter's slice, and write that of its factor, which is a sum over the vocabulary."""
        assert self.low_rank is not None
        self.low_rank.accumulate_up(gradient, factor)
        if self.low_rank.grad_factor is not None:
            partial = self.low_rank.factor_gradient(gradient)
            rows, count = self.plan.of(index)
            with self.plan.at(index):
                whole = reduce_scatter(partial, self.vocab_slice.group, "the adapter's gradient")
            self.low_rank.grad_factor[rows] = whole[:count]

    def held_bytes(self, *gradients: Tensor | None) -> int:
        """Bytes above the inputs at the peak: both models' logits of one chunk, and the gradients."""
        rows, columns = self.vocab_slice.world_size * self.plan.chunk, self.vocab_slice.size
        columns += 0 if self.teacher is None else self.vocab_slice.teacher_columns
        held = bytes_of(*gradients)
        held += self.operand.held_bytes + (0 if self.teacher is None else self.teacher.held_bytes)
        return held + rows * columns * self.dtype.itemsize


class _Context(Context, Protocol):
    dtypes: list[torch.dtype | None]
    weight_scale: float


class VocabParallelDistill(torch.autograd.Function):
    """(hidden [N, D], weight slice [V_r, D], bias [V_r], problem, vocab_slice, weight_scale) -> (loss sum, statistics).

    A low-rank term follows as (factor [N, r], slice of up [V_r, r]).
    Each rank's loss sum is that of its own rows, and the hidden states' gradient that of all ranks' vocabulary.
    The gradient of a slice is that of all ranks' rows, times `weight_scale`.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        vocab_slice: VocabSlice,
        weight_scale: float,
        factor: Tensor | None = None,
        up: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All the work; gradients wait in `ctx`."""
        needed = [need and problem.with_gradient for need in ctx.needs_input_grad]
        low_rank = low_rank_product(factor, up, wide_dtype(hidden.dtype), needed)
        loop = _SlicedLoop(problem, vocab_slice, hidden, weight, bias, low_rank, grads=any(needed))
        grad_hidden, grad_weight, grad_bias = _run(loop, hidden, weight, needed[:3])
        total = loop.total()
        problem.workspace_bytes = loop.held_bytes(grad_hidden, grad_weight, grad_bias)
        columns = 0 if problem.teacher is None else vocab_slice.sizes.shared
        problem.dense_bytes = dense_bytes(problem.num_rows, vocab_slice.sizes.student, columns)
        problem.workspace_bytes += 0 if low_rank is None else low_rank.held_bytes
        extra = () if low_rank is None else (low_rank.grad_factor, low_rank.grad_up)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, *extra)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, factor, up)]
        ctx.weight_scale = weight_scale
        ctx.mark_non_differentiable(total)
        return problem.loss_of(total), total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The waiting gradients times that of the loss."""
        grad_loss, _ = grad_outputs
        scales = (1.0, ctx.weight_scale, ctx.weight_scale, 1.0, ctx.weight_scale)
        triples = zip(ctx.saved_tensors, scales, ctx.dtypes, strict=False)  # without a low-rank term there are three
        hidden, weight, bias, *low_rank = (scaled(grad, grad_loss * scale, dtype) for grad, scale, dtype in triples)
        return hidden, weight, bias, None, None, None, *low_rank


def _run(
    loop: _SlicedLoop, hidden: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All chunks -> gradients of hidden `[N, D]`, weight `[V_r, D]` and bias `[V_r]`, of those that are needed."""
    need_hidden, need_weight, need_bias = needed
    new_weight = torch.empty if loop.plan.num_chunks else torch.zeros  # the first chunk overwrites
    grad_hidden = torch.zeros_like(hidden) if need_hidden else None
    grad_weight = new_weight(weight.shape, dtype=loop.dtype, device=weight.device) if need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=loop.dtype) if need_bias else None
    for index in range(loop.plan.num_chunks):
        with loop.plan.at(index):
            given, gradient = loop.run(index)
        operand, gathered = loop.operand, loop.operand.cast(given["student"])
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
        if loop.low_rank is not None:
            loop.take_low_rank_gradient(index, gradient, given["factor"])
        if operand.rounds_gradient and loop.spec.with_gradient:
            gradient.copy_(gradient.to(gathered.dtype))
        arriving = narrow = None
        if grad_hidden is not None:  # first, so that it travels while the weight's is computed
            factor = operand.for_gradient
            narrow = gradient.to(factor.dtype)
            partial = hidden_gradient(narrow, factor, operand.hidden_gradient_dtype).to(loop.dtype)
            with loop.plan.at(index):
                arriving = reduce_scatter(partial, loop.vocab_slice.group, "the hidden states' gradient", wait=False)
        if grad_weight is not None:
            accumulate_outer(grad_weight, gradient, narrow, gathered, first=index == 0)
        if grad_hidden is not None and arriving is not None:
            own_rows, pending = arriving
            with loop.plan.at(index):
                pending.wait()
            rows, count = loop.plan.of(index)
            grad_hidden[rows] = own_rows[:count].to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias
