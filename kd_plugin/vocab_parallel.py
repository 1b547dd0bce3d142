"""The loss with the vocabulary cut over the ranks: statistics cross the wire, no weights and no logits.

Data-parallel ranks hold different tokens, and each may hold some rows of the heads (FSDP2 leaves it exactly
that). Per chunk, the ranks gather each other's hidden states, multiply them with their own rows of both heads,
exchange a few numbers per token (maxima, sums of exponentials, the divergence's sums), and reduce-scatter the
hidden states' gradient. The weight's gradient of a rank's rows needs nobody else. No rank ever holds a whole
head, its gradient, or a whole row of logits.

Every chunk contains collectives, so all ranks agree on the number of chunks first; short ranks pad with rows of
weight zero. Method: the loss-parallel cross-entropy of Megatron-LM (arXiv:1909.08053), over data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_plugin import row_kernels
from kd_plugin.chunks import Problem, wide_dtype
from kd_plugin.collectives import all_gather, all_reduce, reduce_scatter
from kd_plugin.matmul import Operand, accumulate_outer, add_bias, hidden_gradient, mm_into
from kd_plugin.plan import agreed_plan
from kd_plugin.row_kernels import RowSpec, shards
from kd_plugin.teachers import HeadTeacher
from kd_plugin.workspace import buffer


@dataclass(frozen=True)
class VocabShard:
    """Token ids `[start, stop)` of the shared vocabulary, held by this rank of `group`."""

    start: int
    stop: int
    vocab_size: int
    bounds: list[int]
    """First token id of each rank, and the end of the vocabulary."""
    group: Any
    rank: int
    world_size: int

    @property
    def size(self) -> int:
        """Columns of this rank; the last ranks may have fewer, or none."""
        return self.stop - self.start


def cut(student_size: int, shared_size: int, group: Any) -> VocabShard:
    """Rows of the student's head as FSDP2 cuts them (`torch.chunk`), ending where the teacher's vocabulary does."""
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    length = -(-student_size // ranks)
    bounds = [min(index * length, shared_size) for index in range(ranks + 1)]
    return VocabShard(bounds[rank], bounds[rank + 1], shared_size, bounds, group, rank, ranks)


class _Loop:
    """What the chunks of one call share. All tensors of a chunk have `W * C` rows, of all ranks in turn."""

    def __init__(
        self, problem: Problem, shard: VocabShard, hidden: Tensor, weight: Tensor, bias: Tensor | None, grads: bool
    ) -> None:
        teacher = problem.teacher
        assert teacher is None or isinstance(teacher, HeadTeacher)
        self.problem, self.shard, self.hidden, self.bias = problem, shard, hidden, bias
        self.weight = weight.to(hidden.dtype)
        self.dtype = wide_dtype(hidden.dtype)
        transform = row_kernels.IDENTITY if teacher is None else teacher.transform
        self.spec = RowSpec(problem.objective, problem.student_transform, transform, with_gradient=grads)
        self.operand = Operand("student", self.weight, self.dtype, rounded=problem.rounded_logits)
        self.teacher = teacher
        if teacher is not None:
            teacher.prepare(None, shard.size, self.dtype, rounded=problem.rounded_logits)
        self.plan = agreed_plan(problem.rows, problem.num_rows, problem.chunk_size, shard.group, hidden.device)

    def gathered(self, tensor: Tensor, index: int, what: str) -> Tensor:
        """Chunk `index` of every rank's `[N, ...]`, in rank order: `[W * C, ...]`."""
        return all_gather(self.plan.padded(tensor, index), self.shard.group, what)

    def row_weights(self, index: int) -> Tensor:
        """`[W * C, 1]`: each row's token weight; 0 for padding."""
        weights = self.problem.token_weights
        ones = self.hidden.new_ones(self.hidden.shape[0], dtype=self.dtype) if weights is None else weights
        return self.gathered(ones.to(self.dtype)[:, None], index, "the rows' weights")

    def chunk_logits(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gathered hidden states `[W * C, D]` and both models' logits `[W * C, V_r]` of this rank's columns."""
        hidden = self.gathered(self.hidden, index, "the student's hidden states")
        rows, columns = hidden.shape[0], self.shard.size
        student = buffer("student", rows, columns, self.dtype, hidden.device)
        mm_into(student, hidden, self.operand)
        add_bias(student, self.bias)
        if self.teacher is None:
            return hidden, student, None
        others = self.gathered(self.teacher.hidden, index, "the teacher's hidden states")
        teacher = buffer("teacher", rows, columns, self.dtype, hidden.device)
        self.teacher.multiply_into(teacher, others)
        return hidden, student, teacher

    def labels(self, index: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of every row: label's column here (clamped), whether it is here, and the label's logit (from its owner)."""
        if not self.spec.objective.hard_weight:
            return None
        assert self.problem.targets is not None
        targets = self.gathered(self.problem.targets, index, "labels")
        here = (targets >= self.shard.start) & (targets < self.shard.stop)
        columns = torch.where(here, targets - self.shard.start, 0)[:, None]
        own = logits.gather(1, columns) if self.shard.size else logits.new_zeros(logits.shape[0], 1)
        own = torch.where(here[:, None], own, 0.0)
        all_reduce(own, self.shard.group, "the labels' logits")
        return columns, here[:, None], own

    def held_bytes(self, *gradients: Tensor | None) -> int:
        """Bytes above the inputs at the peak: both models' logits of one chunk, and the gradients."""
        rows, sides = self.shard.world_size * self.plan.chunk, 1 if self.teacher is None else 2
        held = sum(g.numel() * g.element_size() for g in gradients if g is not None)
        return held + sides * rows * self.shard.size * self.dtype.itemsize

    def run(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> gathered hidden `[W * C, D]`, gradient `[W * C, V_r]`, statistics of this rank's rows `[C, K]`."""
        kernel, spec, shard = self.problem.row_kernel, self.spec, self.shard
        hidden, student, teacher = self.chunk_logits(index)
        labels = self.labels(index, student)
        weights = self.row_weights(index)
        vocab_size = shard.vocab_size
        moments = shards.moments(kernel, spec, vocab_size, student, teacher)
        moments = shards.merge(all_gather(moments[None], shard.group, "the softmaxes' statistics"))
        sums = shards.sums(kernel, spec, vocab_size, student, teacher, moments)
        if sums.shape[1]:
            all_reduce(sums, shard.group, "the divergence's sums")
        own_logits = None if labels is None else labels[2]
        statistics = shards.finish(kernel, spec, vocab_size, student, teacher, own_logits, weights, moments, sums)
        if labels is not None and spec.with_gradient and shard.size:
            columns, here, _ = labels
            row_kernels.subtract_labels(spec, student, columns, labels[2], weights * here)
        own = slice(shard.rank * self.plan.chunk, (shard.rank + 1) * self.plan.chunk)
        statistics = statistics[own]
        losses = row_kernels.NUM_LOSSES
        statistics[:, :losses] *= weights[own]
        statistics[:, losses:] *= weights[own] != 0
        return hidden, student, statistics


class VocabParallelDistill(torch.autograd.Function):
    """(hidden [N, D], weight rows [V_r, D], bias [V_r], problem, shard, weight_scale) -> (loss sum, statistics).

    Each rank's loss sum is that of its own rows, and the hidden states' gradient that of all ranks' vocabulary.
    The weight's gradient is that of all ranks' rows, times `weight_scale`.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        shard: VocabShard,
        weight_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """All the work; gradients wait in `ctx`."""
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        loop = _Loop(problem, shard, hidden, weight, bias, grads=need_hidden or need_weight or need_bias)
        total = hidden.new_zeros(len(row_kernels.STATISTICS), dtype=loop.dtype)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=loop.dtype) if need_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=loop.dtype) if need_bias else None
        for index in range(loop.plan.num_chunks):
            with loop.plan.at(index):
                gathered, gradient, statistics = loop.run(index)
            total += statistics.sum(0)
            if not loop.spec.with_gradient:
                continue
            if grad_weight is not None:
                accumulate_outer(grad_weight, gradient, gradient.to(gathered.dtype), gathered, first=index == 0)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            if grad_hidden is not None:
                partial = hidden_gradient(gradient.to(hidden.dtype), loop.weight).to(loop.dtype)
                rows, count = loop.plan.of(index)
                with loop.plan.at(index):
                    own_rows = reduce_scatter(partial, shard.group, "the hidden states' gradient")
                grad_hidden[rows] = own_rows[:count].to(hidden.dtype)
        problem.workspace_bytes = loop.held_bytes(grad_hidden, grad_weight, grad_bias)
        problem.dense_bytes = problem.num_rows * shard.vocab_size * 2 * loop.dtype.itemsize
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.weight_scale = weight_scale
        ctx.mark_non_differentiable(total)
        objective = problem.objective
        return objective.soft_weight * total[0] + objective.hard_weight * total[1], total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """The waiting gradients times `grad_loss`."""
        scales = (1.0, ctx.weight_scale, ctx.weight_scale)
        triples = zip(ctx.saved_tensors, scales, ctx.dtypes, strict=True)
        return (*(None if g is None else (g * (grad_loss * s)).to(d) for g, s, d in triples), None, None, None)
