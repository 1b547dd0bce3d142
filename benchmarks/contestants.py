"""The losses that race: one objective, the same tensors, each through its own library's front door.

The objective is `soft_weight * T^2 * divergence + hard_weight * cross-entropy`, averaged over the valid rows.

- kd_plugin: `kd_plugin.distill_loss`.
- GEMMs only: the floor. The four matrix products of the valid rows by `torch.mm`, both logits and the weight's
  gradient in fp32, in kd_plugin's chunks; a faster library than `torch.mm` calls may fall below it.
- compiled naive: `torch.compile` of the dense loss on whole logits.
- Liger: `LigerFusedLinearJSDLoss`; its beta = 0 is KL(teacher||student), 1 is KL(student||teacher), and between
  them beta is the teacher's share of the mixture. It does not multiply by T^2, so its soft weight does.
- TRL: `ChunkedDivergenceFunction`, the same beta. It has no cross-entropy, so it does less than the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import IGNORE_INDEX, Case, Tensors
from torch import Tensor

import kd_plugin as kd

Step = Callable[[], "Tensor | None"]
"""Runs one loss with its gradients, which it leaves in `.grad`; returns the loss."""


def dense_loss(case: Case, tensors: Tensors) -> Tensor:
    """The objective on whole logits, in at least fp32 after the products; in fp64 it is the oracle."""
    return _dense_sum(case, *tensors) / max(case.valid, 1)


def _dense_sum(case: Case, *inputs: Tensor) -> Tensor:
    """Reads neither `case.rows` nor what follows from it, so that one compiled graph serves all numbers of rows."""
    tensors = Tensors(*inputs)
    wide = torch.promote_types(tensors.hidden.dtype, torch.float32)
    student = (tensors.hidden @ tensors.weight.T).to(wide)
    teacher = (tensors.teacher_hidden @ tensors.teacher_weight.T).to(wide)
    loss: Any = 0.0
    if case.soft_weight:
        log_q = (student / case.temperature).log_softmax(-1)
        log_p = (teacher / case.temperature).log_softmax(-1)
        rows = _divergence(case.beta, log_q, log_p).masked_fill(tensors.targets == IGNORE_INDEX, 0.0)
        loss = loss + case.soft_weight * case.temperature**2 * rows.sum()
    if case.hard_weight:
        loss = loss + case.hard_weight * F.cross_entropy(
            student, tensors.targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return loss


@functools.cache
def _compiled_dense_sum() -> Callable[..., Tensor]:
    return torch.compile(_dense_sum)


def _divergence(beta: float, log_q: Tensor, log_p: Tensor) -> Tensor:
    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta == 0.0 else kl(log_q, log_p)
    shares = log_q.new_tensor([1 - beta, beta]).log()
    log_m = torch.logaddexp(log_q + shares[0], log_p + shares[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _trained(case: Case, tensors: Tensors, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        tensors.clear()
        narrow = torch.autocast(tensors.hidden.device.type, torch.bfloat16, enabled=case.autocast)
        with torch.set_grad_enabled(case.train), narrow:
            value = loss()
        if case.train:
            value.backward()
        return value.detach()

    return step


def kd_plugin(case: Case, tensors: Tensors) -> Step:
    """kd_plugin's `distill_loss`."""
    config = case.config()
    return _trained(case, tensors, lambda: kd.distill_loss(*tensors, config=config).loss)


def gemms(case: Case, tensors: Tensors) -> Step:
    """The floor: `torch.mm`; on a CPU in fp32 where the result must be, as it has no `out_dtype`."""
    _, weight, _, teacher_weight, _ = (t.detach() for t in tensors)
    keep = tensors.targets != IGNORE_INDEX
    hidden, teacher_hidden = tensors.hidden.detach()[keep], tensors.teacher_hidden[keep]
    chunk = case.chunk
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student, teacher = (torch.empty(chunk, case.vocab, dtype=wide, device=case.device) for _ in range(2))
    # What a device multiplies fastest are zeros, of which fresh memory may be full.
    narrow = student if hidden.dtype == wide else torch.randn(student.shape, dtype=hidden.dtype, device=case.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=wide)
    mixed = {"out_dtype": wide} if hidden.is_cuda and hidden.dtype != wide else {}

    def step() -> None:
        upcast = [t if mixed else t.to(wide) for t in (hidden, teacher_hidden, weight, teacher_weight)]
        for start in range(0, case.valid, chunk):
            rows = slice(start, min(start + chunk, case.valid))
            x, y, (w, v) = upcast[0][rows], upcast[1][rows], upcast[2:]
            s, t = student[: len(x)], teacher[: len(x)]
            torch.mm(x, w.t(), out=s, **mixed)
            torch.mm(y, v.t(), out=t, **mixed)
            if case.train:
                torch.mm(narrow[: len(x)], weight, out=grad_hidden[rows])
                gradient = narrow[: len(x)] if mixed else s
                torch.addmm(grad_weight, gradient.t(), x, beta=int(start > 0), out=grad_weight, **mixed)

    return step


def compiled_naive(case: Case, tensors: Tensors) -> Step:
    """`torch.compile` of the dense loss, forward and backward."""
    compiled = _compiled_dense_sum()
    return _trained(case, tensors, lambda: compiled(case, *tensors) / max(case.valid, 1))


def naive(case: Case, tensors: Tensors) -> Step:
    """The dense loss in eager mode."""
    return _trained(case, tensors, lambda: dense_loss(case, tensors))


def liger_loss(case: Case, *, compiled: bool = True) -> Callable[[Tensors], Tensor]:
    """Liger-Kernel's chunked JSD loss with its default of 1024 rows per chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=case.hard_weight,
        weight_soft_loss=case.soft_weight * case.temperature**2,
        beta=case.beta,
        ignore_index=IGNORE_INDEX,
        temperature=case.temperature,
        compiled=compiled,
        chunk_size=case.chunk_size or 1024,
    )
    return lambda tensors: module(*tensors)


def liger(case: Case, tensors: Tensors, *, compiled: bool = True) -> Step:
    """Liger-Kernel's chunked JSD loss, forward and backward."""
    loss = liger_loss(case, compiled=compiled)
    return _trained(case, tensors, lambda: loss(tensors))


def liger_eager(case: Case, tensors: Tensors) -> Step:
    """Liger-Kernel's chunked JSD loss without torch.compile."""
    return liger(case, tensors, compiled=False)


def trl(case: Case, tensors: Tensors) -> Step:
    """TRL's chunked divergence, called as its DistillationTrainer does: valid rows are packed on a GPU only."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    factor = case.soft_weight * case.temperature**2 / max(case.valid, 1)

    def loss() -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight, targets = tensors
        valid = targets != IGNORE_INDEX
        if case.device != "cpu":
            hidden, teacher_hidden = hidden[valid], teacher_hidden[valid]
        rows, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, case.beta, case.temperature
        )
        return factor * (rows.masked_fill(~valid, 0.0) if case.device == "cpu" else rows).sum()

    return _trained(case, tensors, loss)


CONTESTANTS: dict[str, Callable[[Case, Tensors], Step]] = {
    "kd_plugin": kd_plugin,
    "GEMMs only": gemms,
    "compiled naive": compiled_naive,
    "naive": naive,
    "Liger": liger,
    "Liger eager": liger_eager,
    "TRL": trl,
}


class Errors(NamedTuple):
    """Relative errors of one contestant against the fp64 oracle."""

    loss: float
    hidden: float
    weight: float


def relative(value: Tensor, wanted: Tensor) -> float:
    """The relative error |value - wanted| / |wanted| in fp64."""
    wanted = wanted.double()
    return float((value.double() - wanted).norm() / wanted.norm())


def errors(name: str, case: Case, tensors: Tensors, oracle: tuple[Tensor, Tensor, Tensor]) -> Errors:
    """Relative errors of contestant `name`; `oracle` comes from `oracle_of` for the same case and tensors."""
    step = CONTESTANTS[name](case, tensors)
    loss = step()
    assert loss is not None and tensors.hidden.grad is not None and tensors.weight.grad is not None
    pairs = zip((loss, tensors.hidden.grad, tensors.weight.grad), oracle, strict=True)
    return Errors(*(relative(one, other) for one, other in pairs))


def oracle_of(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients `(scalar, [N, D], [V, D])` of the very same inputs in fp64."""
    wide = tensors.to(torch.float64)
    loss = dense_loss(case, wide)
    return (loss.detach(), *torch.autograd.grad(loss, (wide.hidden, wide.weight)))


def without_cross_entropy(case: Case) -> Case:
    """`case` without cross-entropy, which TRL does not have."""
    return replace(case, hard_weight=0.0)
