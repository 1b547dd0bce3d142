"""Errors of one contestant's gradients against fp64, where whole fp64 logits do not fit the device.

The loss and its gradient by the logits have a closed form, which is evaluated in fp64 in blocks of rows. Two samples
of the gradients follow from it: that of the hidden states for some rows, and that of the head for some token ids
over all rows. Half of those token ids are labels, whose entries the cross-entropy makes large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import IGNORE_INDEX, Case, Tensors
from contestants import relative
from torch import Tensor

ROWS, TOKEN_IDS = 64, 256
_BLOCK_BYTES = 2**28  # of one model's fp64 logits; six such arrays live at once


class Oracle(NamedTuple):
    """What a contestant should have found, in fp64."""

    loss: Tensor  # scalar
    rows: Tensor  # [R] int64
    grad_hidden: Tensor  # [R, D]
    token_ids: Tensor  # [S] int64
    grad_weight: Tensor  # [S, D]


class SampledErrors(NamedTuple):
    """Relative errors `|found - wanted| / |wanted|`."""

    loss: float
    hidden: float
    weight: float


def sampled_oracle(case: Case, tensors: Tensors, *, num_rows: int = ROWS, num_token_ids: int = TOKEN_IDS) -> Oracle:
    """Loss and samples of both gradients of forward KL plus cross-entropy.

    Raises:
        ValueError: `case` has another divergence, whose gradient is not written here.
    """
    if case.divergence != "forward_kl":
        raise ValueError(f"the closed form here is forward_kl's; the case has {case.divergence}")
    rows, token_ids = _samples(tensors, num_rows, num_token_ids)
    weight, teacher_weight = tensors.weight.detach().double(), tensors.teacher_weight.double()
    hidden = tensors.hidden.detach()
    loss = weight.new_zeros(())
    columns = weight.new_empty(len(hidden), len(token_ids))
    block = max(1, _BLOCK_BYTES // (8 * case.vocab))
    for start in range(0, len(hidden), block):
        part = slice(start, start + block)
        student = hidden[part].double() @ weight.T
        teacher = tensors.teacher_hidden[part].double() @ teacher_weight.T
        losses, gradient = _rows(case, student, teacher, tensors.targets[part])
        loss += losses
        columns[part] = gradient[:, token_ids]
    student = hidden[rows].double() @ weight.T
    teacher = tensors.teacher_hidden[rows].double() @ teacher_weight.T
    _, gradient = _rows(case, student, teacher, tensors.targets[rows])
    return Oracle(loss, rows, gradient @ weight, token_ids, columns.T @ hidden.double())


def _samples(tensors: Tensors, num_rows: int, num_token_ids: int) -> tuple[Tensor, Tensor]:
    device, valid = tensors.hidden.device, (tensors.targets != IGNORE_INDEX).nonzero().squeeze(1)
    generator = torch.Generator(device).manual_seed(0)

    def some(of: Tensor, count: int) -> Tensor:
        return of[torch.randperm(len(of), generator=generator, device=device)[:count]]

    labels = some(tensors.targets[valid].unique(), num_token_ids // 2)
    others = some(torch.arange(len(tensors.weight), device=device), num_token_ids // 2)
    return some(valid, num_rows), torch.cat([labels, others]).unique()


def _rows(case: Case, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 logits `[n, V]` of both, labels `[n]` -> the rows' share of the loss, its gradient by the student's."""
    valid = targets != IGNORE_INDEX
    labels = targets.where(valid, 0)[:, None]
    loss, gradient = student.new_zeros(len(student)), torch.zeros_like(student)
    if case.soft_weight:
        log_p = (teacher / case.temperature).log_softmax(-1)
        log_q = (student / case.temperature).log_softmax(-1)
        p = log_p.exp()
        loss += case.soft_weight * case.temperature**2 * (p * (log_p - log_q)).sum(-1)
        gradient += (case.soft_weight * case.temperature) * (log_q.exp() - p)
    if case.hard_weight:
        log_q = student.log_softmax(-1)
        loss -= case.hard_weight * log_q.gather(1, labels).squeeze(1)
        gradient += case.hard_weight * log_q.exp()
        gradient.scatter_add_(1, labels, torch.full_like(labels, -case.hard_weight, dtype=gradient.dtype))
    count = max(case.valid, 1)
    return (loss * valid).sum() / count, gradient.mul_(valid[:, None] / count)


def sampled_errors(oracle: Oracle, loss: Tensor, tensors: Tensors) -> SampledErrors:
    """Errors of a contestant's `loss` and of the gradients that it left in `tensors`."""
    grad_hidden, grad_weight = tensors.hidden.grad, tensors.weight.grad
    assert grad_hidden is not None and grad_weight is not None
    return SampledErrors(
        relative(loss, oracle.loss),
        relative(grad_hidden[oracle.rows], oracle.grad_hidden),
        relative(grad_weight[oracle.token_ids], oracle.grad_weight),
    )
