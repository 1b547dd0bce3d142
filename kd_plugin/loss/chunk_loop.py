"""The loop over chunks: hidden states in, loss sums and gradients out, never a `[tokens, vocab]` tensor.

Per chunk: one product for the student's logits, one for the teacher's, one row pass that leaves the gradient
where the student's logits were, one product for the hidden states' gradient and one for the weight's.

A student with more token ids V than its teacher: the hard loss takes all of them, the soft loss those of both (see
`row_kernels`). Of a teacher with more, the others are never multiplied.

Memory above the inputs: `8 * C * V` bytes of chunk buffers (fp32; the teacher's is reused for the gradient in
the precision of the model; `4 * C * (V + V')` where the teacher has fewer token ids V'), the gradient of the hidden
states, and the fp32 gradient of the weight. On a CPU with half-precision models, copies of both heads
come on top, in fp32 or packed, and under autocast copies of fp32 heads: in fp32 on a CPU, in its dtype elsewhere (see
`matmul`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kd_plugin.divergences.objective import Objective
from kd_plugin.loss.buffers import buffer, bytes_of
from kd_plugin.loss.chunk_plan import ChunkPlan, agreed_plan, local_plan
from kd_plugin.loss.chunk_size import dense_bytes, teacher_columns
from kd_plugin.loss.low_rank import LowRankProduct
from kd_plugin.loss.matmul import EXACT, Operand, Rounding, accumulate_outer, add_bias, hidden_gradient, mm_into
from kd_plugin.loss.split import Split, row_weights
from kd_plugin.loss.teacher import TeacherSource
from kd_plugin.row_kernels import dispatch
from kd_plugin.row_kernels.row_pass import IDENTITY, LogitTransform, RowSpec, subtract_labels
from kd_plugin.row_kernels.statistics import STATISTICS


@dataclass
class Problem:
    """One call of the loss: everything but the differentiable tensors. Flattened rows."""

    objective: Objective
    teacher: TeacherSource | None
    targets: Tensor | None  # [N] int64
    rows: Tensor | None  # [n] int64 indices of the valid rows; None: all of them
    num_rows: int  # n
    token_weights: Tensor | None  # [N]
    chunk_size: int
    row_kernel: str
    split: Split | None = None
    """Which rows count in which loss; None: all in both."""
    student_transform: LogitTransform = IDENTITY
    rounding: Rounding = EXACT
    """What the heads' products round."""
    with_gradient: bool = True
    """False under no_grad: autograd's own `needs_input_grad` does not know of it."""
    workspace_bytes: int = 0
    """Out: bytes held above the inputs at the loop's peak."""
    group_rows: int | None = None
    """Out: valid rows of all ranks that agreed on the chunks (`ChunkPlan.group_rows`)."""
    dense_bytes: int = 0
    """Out: bytes that the fp32 logits of all rows would have taken, both models' together."""

    def row_spec(self, *, with_gradient: bool) -> RowSpec:
        """What a row pass has to do."""
        transform = IDENTITY if self.teacher is None else self.teacher.transform
        return RowSpec(self.objective, self.student_transform, transform, with_gradient=with_gradient)

    def loss_of(self, sums: Tensor) -> Tensor:
        """The loss sum (0-d) of both losses' sums, the first of the statistics."""
        hard = sums[1] if self.split is None else sums[1] * self.split.factor
        return self.objective.weighted(sums[0], hard)

    def weighted(self, factors: Tensor) -> Problem:
        """The same problem with each row's gradient multiplied by `factors` `[N]`."""
        weights = factors if self.token_weights is None else factors * self.token_weights
        return replace(self, token_weights=weights)


class Needed(NamedTuple):
    """Which gradients are wanted: the product behind any other is skipped."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclass
class Result:
    """Sums over the valid rows, and un-normalised gradients."""

    sums: Tensor  # [len(STATISTICS)]; the losses are weighted by token_weights, the metrics are not
    grad_hidden: Tensor | None  # [N, D]
    grad_weight: Tensor | None  # [V, D] fp32 (fp64 for fp64 models)
    grad_bias: Tensor | None  # [V]
    per_row: Tensor | None  # [n, len(STATISTICS)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of logits, statistics and the weight's gradient."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """Each row's logit of its label, `[n, 1]`."""
    try:
        return logits.gather(1, targets)
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):  # out of memory, or any other trouble of the device
            raise
        raise ValueError(foreign_labels(logits.shape[1], str(error))) from error


def foreign_labels(vocab_size: int, found: str) -> str:
    """What is wrong where a row that counts has a label that is no token id."""
    return (
        f"loss_rows point at labels outside the vocabulary of {vocab_size} ({found}): they must list the rows whose "
        "(shifted) label is not ignore_index, and no others"
    )


def _plan(problem: Problem, device: torch.device) -> ChunkPlan:
    group = None if problem.teacher is None else problem.teacher.group
    if group is None:
        return local_plan(problem.rows, problem.num_rows, problem.chunk_size)
    return agreed_plan(problem.rows, problem.num_rows, problem.chunk_size, group, device)


class _ChunkLoop:
    """State shared by the chunks of one call."""

    def __init__(
        self,
        problem: Problem,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: LowRankProduct | None,
    ) -> None:
        self.problem, self.hidden, self.bias, self.low_rank = problem, hidden, bias, low_rank
        self.dtype, vocab_size = wide_dtype(hidden.dtype), weight.shape[0]
        self.operand = Operand("student", weight, self.dtype, problem.rounding, hidden_dtype=hidden.dtype)
        self.plan = _plan(problem, hidden.device)
        problem.group_rows = self.plan.group_rows
        capacity = max(self.plan.chunk, 2)  # row_kernels.run never compiles for a single row
        self.student = buffer("student", capacity, vocab_size, self.dtype, hidden.device)
        self.teacher = None
        columns = 0
        if problem.teacher is not None:
            columns = teacher_columns(problem.objective, vocab_size, problem.teacher.vocab_size)
            problem.teacher.prepare(self.plan, columns, self.dtype, problem.rounding)
            self.teacher = buffer("teacher", capacity, columns, self.dtype, hidden.device)
        problem.dense_bytes = dense_bytes(problem.num_rows, vocab_size, columns)

    def run_rows(self, spec: RowSpec, index: int, hidden: Tensor) -> Tensor:
        """Logits and row pass of one chunk; leaves the gradient in `self.student`. -> statistics `[n, K]`."""
        problem = self.problem
        rows, n = self.plan.of(index)
        logits = self.student[:n]
        mm_into(logits, hidden, self.operand)
        add_bias(logits, self.bias)
        if self.low_rank is not None:
            self.low_rank.add_to(logits, self.low_rank.factor[rows])
        if problem.teacher is not None:
            assert self.teacher is not None
            problem.teacher.logits_into(self.teacher[:n], index)
        targets = target_logits = None
        weights = row_weights(problem.token_weights, problem.split, rows, self.dtype)
        if spec.objective.hard_weight:
            assert problem.targets is not None
            targets = problem.targets[rows, None]
            target_logits = weights.finite(_of_labels(logits, targets))
        given = (self.student, self.teacher, target_logits, weights.soft, weights.hard)
        statistics = dispatch.run(problem.row_kernel, spec, n, *given)
        if spec.with_gradient and targets is not None and target_logits is not None:
            subtract_labels(spec, logits, targets, target_logits, weights.of_labels)
        weights.apply_to(statistics)
        return statistics

    def teacher_only(self, index: int) -> None:
        """Take part in a chunk of which this rank has no rows."""
        assert self.problem.teacher is not None and self.teacher is not None
        self.problem.teacher.logits_into(self.teacher[:0], index)

    @property
    def held_bytes(self) -> int:
        """Bytes that the loop holds above its inputs, but for the gradients."""
        teacher, low_rank = self.problem.teacher, self.low_rank
        held = bytes_of(self.student, self.teacher) + self.operand.held_bytes
        return held + (0 if teacher is None else teacher.held_bytes) + (0 if low_rank is None else low_rank.held_bytes)

    def narrow(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """`gradient` in the model's precision; in the teacher's buffer, which the row pass is done with."""
        if gradient.dtype == dtype:
            return gradient
        if self.teacher is None or self.teacher.nbytes < gradient.numel() * dtype.itemsize:
            return gradient.to(dtype)
        return self.teacher.view(-1).view(dtype)[: gradient.numel()].view_as(gradient).copy_(gradient)


def run(
    problem: Problem,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    needed: Needed,
    *,
    keep_rows: bool = False,
    low_rank: LowRankProduct | None = None,
) -> Result:
    """All chunks of one call.

    Autocast is off inside: the problem says what the products round (`Problem.rounding`), and nothing else does.

    Args:
        problem: what to compute; its "Out" fields are filled in.
        hidden: `[N, D]`.
        weight: `[V, D]`.
        bias: `[V]`.
        needed: the gradients of these that are wanted.
        keep_rows: whether each row's statistics are wanted, too.
        low_rank: one more term of the student's logits, which keeps its own gradients.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        loop = _ChunkLoop(problem, hidden, weight, bias, low_rank)
        gradients = _Gradients(loop, weight, needed)
        sums, per_row = _run_chunks(loop, gradients, keep_rows=keep_rows)
    problem.workspace_bytes = loop.held_bytes + gradients.held_bytes
    return Result(sums, gradients.hidden, gradients.weight, gradients.bias, per_row)


def _run_chunks(loop: _ChunkLoop, gradients: _Gradients, *, keep_rows: bool) -> tuple[Tensor, Tensor | None]:
    """-> the statistics' sums, and those of each row `[n, K]` if they are kept."""
    problem, hidden = loop.problem, loop.hidden
    spec = problem.row_spec(with_gradient=gradients.wanted)
    sums = hidden.new_zeros(len(STATISTICS), dtype=loop.dtype)
    per_row = sums.new_empty(problem.num_rows, sums.numel()) if keep_rows else None
    for index in range(loop.plan.num_chunks):
        rows, count = loop.plan.of(index)
        if count == 0:  # other ranks still have rows, and need this one for their teacher's
            loop.teacher_only(index)
            continue
        chunk_hidden = loop.operand.cast(hidden[rows])
        statistics = loop.run_rows(spec, index, chunk_hidden)
        sums += statistics.sum(0)
        if per_row is not None:
            per_row[index * loop.plan.chunk :][:count] = statistics
        if spec.with_gradient:
            gradients.add(loop.student[:count], rows, chunk_hidden, first=index == 0)
    return sums, per_row


class _Gradients:
    """What the chunks' gradients add up to; None for those that are not needed."""

    def __init__(self, loop: _ChunkLoop, weight: Tensor, needed: Needed) -> None:
        problem, hidden = loop.problem, loop.hidden
        new = torch.empty_like if problem.rows is None else torch.zeros_like
        self._loop = loop
        self.wanted = any(needed) or (loop.low_rank is not None and loop.low_rank.needs_gradient)
        self.hidden = new(hidden) if needed.hidden else None
        self.weight = _weight_gradient(weight, loop.dtype, problem.num_rows) if needed.weight else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=loop.dtype) if needed.bias else None

    @property
    def held_bytes(self) -> int:
        """Bytes of the gradients."""
        return bytes_of(self.hidden, self.weight, self.bias)

    def add(self, gradient: Tensor, rows: slice | Tensor, chunk_hidden: Tensor, *, first: bool) -> None:
        """Add those of one chunk's logits, `[n, V]`, of `rows`."""
        loop, dtype, operand = self._loop, chunk_hidden.dtype, self._loop.operand
        if self.bias is not None:
            self.bias += gradient.sum(0)
        if loop.low_rank is not None:
            loop.low_rank.take_gradient(gradient, rows)
        if operand.rounds_gradient:
            gradient.copy_(loop.narrow(gradient, dtype))
        narrow = None
        if self.hidden is not None:
            factor = operand.for_gradient
            narrow = loop.narrow(gradient, factor.dtype)
            self.hidden[rows] = hidden_gradient(narrow, factor, operand.hidden_gradient_dtype).to(self.hidden.dtype)
        if self.weight is not None:
            if chunk_hidden.is_cuda and (narrow is None or narrow.dtype != dtype):
                narrow = loop.narrow(gradient, dtype)
            accumulate_outer(self.weight, gradient, narrow, chunk_hidden, first=first)


def _weight_gradient(weight: Tensor, dtype: torch.dtype, num_rows: int) -> Tensor:
    """Uninitialised where the first chunk writes, zero where there is no chunk."""
    new = torch.empty if num_rows else torch.zeros
    return new(weight.shape, dtype=dtype, device=weight.device)
