"""Under autocast the operands of the heads' products are rounded as it rounds them, and no result is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.loss.low_rank import LowRank
from tests import oracle
from tests.allocations import NewTensors
from tests.loss_cases import config_of, run, sums_of
from tests.oracle import DIVERGENCES, Problem, gradients, make_problem, relative_error

HALVES = (torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(autouse=True, scope="module")
def give_the_buffers_back() -> Iterator[None]:
    yield
    release_workspace()


class RoundedProduct(torch.autograd.Function):
    """`hidden @ weight.T` in fp64 of operands rounded to `dtype`; so are those of both gradients' products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        hidden, weight = (x.to(dtype).double() for x in (hidden, weight))
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(ctx.dtype).double()
        return gradient @ weight, gradient.T @ hidden, None


def expected(problem: Problem, config: kd.DistillConfig, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
    """Loss and gradients; the logits' gradient is rounded as the loss has it, before it is divided by the rows."""
    wide = problem.exact()
    student = RoundedProduct.apply(wide.hidden, wide.weight, dtype)
    teacher = problem.teacher_hidden.to(dtype).double() @ problem.teacher_weight.to(dtype).double().T
    if wide.bias is not None:
        student, teacher = student + wide.bias, teacher + problem.teacher_bias.double()
    total = oracle.distill_logits(student, teacher, problem.targets, config, num_items=1)
    return total.loss.item() / total.num_valid, [g / total.num_valid for g in gradients(total.loss, wide.leaves)]


def fp32_problem(device: str = "cpu", **options: Any) -> Problem:
    """Odd sizes, fewer token ids of the teacher, ignored rows."""
    sizes = {"rows": 37, "width": 19, "teacher_width": 23, "vocab": 101, "teacher_vocab": 83}
    problem = make_problem(**{**sizes, **options}, dtype=torch.float32, bias=True)
    moved = {name: value.detach().to(device) for name, value in vars(problem).items() if value is not None}
    leaves = {name: moved[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    return Problem(**{**moved, **leaves})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_operands_are_rounded_and_results_are_not(divergence: str, dtype: torch.dtype, device: str) -> None:
    problem, config = fp32_problem(device), config_of(divergence, temperature=2.0, chunk_size=16)
    with torch.autocast(device, dtype):
        out = run(problem, config)
    loss, wanted = expected(problem, config, dtype)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    found, plain = (gradients(x.loss, problem.leaves) for x in (out, run(problem, config)))
    for leaf, grad, exact, truth in zip(problem.leaves, found, plain, wanted, strict=True):
        assert grad.dtype == leaf.dtype == torch.float32
        assert relative_error(grad, truth) < 2e-5
        assert relative_error(exact, truth) > 5e-5, "rounding that changes nothing would test nothing"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["hidden", "weight", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize("given", HALVES, ids=str)
def test_one_operand_may_have_a_half_precision_already(which: str, given: torch.dtype, device: str) -> None:
    """As a model's own autocast leaves its hidden states, or a teacher in half precision."""
    problem, config = fp32_problem(device), config_of("jsd", chunk_size=16)
    narrow = getattr(problem, which).detach().to(given)
    mixed = replace(problem, **{which: narrow.requires_grad_(which in ("hidden", "weight"))})
    with torch.autocast(device, torch.bfloat16):
        out = run(mixed, config)
    loss, wanted = expected(mixed, config, torch.bfloat16)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    for leaf, found, truth in zip(mixed.leaves, gradients(out.loss, mixed.leaves), wanted, strict=True):
        assert found.dtype == leaf.dtype
        assert relative_error(found, truth) < (2e-5 if leaf.dtype == torch.float32 else torch.finfo(given).eps)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_err_no_more_than_eager_under_autocast(divergence: str, dtype: torch.dtype) -> None:
    """Late in distillation, where eager's rounded logits leave little of the gradient."""
    problem = make_problem(61, 33, 33, 203, dtype=torch.float32, ignored=(3, 50))
    problem.teacher_weight = problem.weight.detach().clone()
    problem.teacher_hidden = (problem.hidden.detach() * 1.02).clone()
    config = config_of(divergence, chunk_size=16, soft_weight=1, hard_weight=0)
    wide = problem.exact()
    wanted = gradients(wide.expected(config).loss, wide.leaves)
    with torch.autocast("cpu", dtype):
        ours = run(problem, config).loss
        student, teacher = F.linear(*problem.leaves), F.linear(problem.teacher_hidden, problem.teacher_weight)
        assert student.dtype == dtype
        eager = kd.reference.distill_logits(student.float(), teacher.float(), problem.targets, config=config).loss
    for mine, theirs, truth in zip(
        gradients(ours, problem.leaves), gradients(eager, problem.leaves), wanted, strict=True
    ):
        assert relative_error(mine, truth) < relative_error(theirs, truth)


def test_rounded_logits_under_autocast_are_eagers() -> None:
    problem = make_problem(61, 33, 33, 203, dtype=torch.float32)
    config = config_of("jsd", chunk_size=16, logits_dtype="input")
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(problem, config)
        student, teacher = F.linear(*problem.leaves), F.linear(problem.teacher_hidden, problem.teacher_weight)
    eager = kd.reference.distill_logits(student.float(), teacher.float(), problem.targets, config=config)
    assert ours.loss.item() == pytest.approx(eager.loss.item(), rel=1e-5)
    for mine, theirs in zip(gradients(ours.loss, problem.leaves), gradients(eager.loss, problem.leaves), strict=True):
        assert relative_error(mine, theirs) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_rounds_alike(dtype: torch.dtype) -> None:
    problem, config = fp32_problem(), config_of("reverse_kl", temperature=2.0)
    with torch.autocast("cpu", dtype):
        ours = run(problem, config).loss
        dense = kd.reference.distill_loss(*problem, config=config, **problem.biases).loss
    assert dense.item() == pytest.approx(ours.item(), rel=1e-6)
    for mine, theirs in zip(gradients(ours, problem.leaves), gradients(dense, problem.leaves), strict=True):
        assert relative_error(mine, theirs) < torch.finfo(dtype).eps


def test_what_counts_is_autocast_at_the_call_not_in_backward() -> None:
    problem, config = fp32_problem(), config_of("jsd", chunk_size=16)
    arguments = {"config": config, **problem.biases}
    with torch.autocast("cpu", torch.bfloat16):
        under = kd.distill_loss_per_token(*problem, **arguments)
    outside = kd.distill_loss_per_token(*problem, **arguments)
    rows = (problem.targets != config.ignore_index).sum()
    loss, wanted = expected(problem, config, torch.bfloat16)
    assert under.loss.sum().item() / rows == pytest.approx(loss, rel=1e-6)
    for found, truth in zip(gradients(under.loss.sum() / rows, problem.leaves), wanted, strict=True):
        assert relative_error(found, truth) < 2e-5
    plain = gradients(outside.loss.sum(), problem.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, gradients(outside.loss.sum(), problem.leaves)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fp64_and_what_has_the_precision_already_stay_as_they_are(dtype: torch.dtype) -> None:
    problem, config = make_problem(37, 19, 23, 101, dtype=dtype), config_of("jsd", chunk_size=16)
    plain = run(problem, config).loss
    with torch.autocast("cpu", torch.bfloat16):
        under = run(problem, config).loss
    assert torch.equal(plain, under)
    assert all(map(torch.equal, gradients(plain, problem.leaves), gradients(under, problem.leaves)))


def test_a_low_rank_term_is_not_rounded() -> None:
    problem, config = fp32_problem(), config_of("forward_kl", chunk_size=16)
    generator = torch.Generator().manual_seed(3)
    factor, up = (torch.randn(n, 3, generator=generator).requires_grad_() for n in (37, 101))
    with torch.autocast("cpu", torch.bfloat16):
        sums = sums_of(problem, config, low_rank=LowRank(factor, up))
    wide = problem.exact()
    parts = [x.detach().double().requires_grad_() for x in (factor, up)]
    student = RoundedProduct.apply(wide.hidden, wide.weight, torch.bfloat16) + parts[0] @ parts[1].T + wide.bias
    rounded = (x.bfloat16().double() for x in (problem.teacher_hidden, problem.teacher_weight))
    teacher = F.linear(*rounded, problem.teacher_bias.double())
    truth = oracle.distill_logits(student, teacher, problem.targets, config, num_items=1).loss
    assert sums.loss_sum.item() == pytest.approx(truth.item(), rel=1e-6)
    found = gradients(sums.loss_sum, [*problem.leaves, factor, up])
    for grad, wanted in zip(found, gradients(truth, [*wide.leaves, *parts]), strict=True):
        assert relative_error(grad, wanted) < 2e-5


def test_a_gradient_scaler_gets_fp32_gradients_that_fp16_does_not_flush() -> None:
    """1 / N times a small difference is zero in fp16, which the scaler is there for."""
    problem = make_problem(2048, 6, 6, 23, dtype=torch.float32, ignored=())
    problem.teacher_weight, problem.teacher_hidden = problem.weight.detach().clone(), problem.hidden.detach() * 1.05
    config = config_of("forward_kl", chunk_size=999, soft_weight=1, hard_weight=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", torch.float16):
        loss = run(problem, config).loss
    scaler.scale(loss).backward()
    for leaf, truth in zip(problem.leaves, expected(problem, config, torch.float16)[1], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad / 2**16, truth) < 1e-4


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
def test_what_is_held_is_a_copy_of_each_head(logits_dtype: str) -> None:
    rows, width, vocab, chunk = 320, 8, 1021, 32
    problem = make_problem(rows, width, width, vocab, dtype=torch.float32, ignored=())
    config = config_of(chunk_size=chunk, logits_dtype=logits_dtype)
    plain = sums_of(problem, config).workspace_bytes
    assert plain == 8 * chunk * vocab + 4 * width * (rows + vocab)
    with NewTensors() as made, torch.autocast("cpu", torch.bfloat16):
        sums = sums_of(problem, config)
        sums.loss_sum.backward()
    assert sums.workspace_bytes == plain + 2 * (4 if logits_dtype == "float32" else 2) * width * vocab
    assert max(made.numels.values()) == chunk * vocab
