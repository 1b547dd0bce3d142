"""distill_loss at the edges: low precision, frozen parts, extreme logits, parts that must be skipped."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.buffers import release_workspace
from tests.allocations import NewTensors
from tests.loss_cases import check, config_of, run
from tests.oracle import DIVERGENCES, Problem, gradients, make_problem, relative_error

HALVES = (torch.bfloat16, torch.float16)


# -- low precision ------------------------------------------------------------------------------------------


def naive_gradients(problem: Problem, config: kd.DistillConfig) -> list[Tensor]:
    """Dense logits in the precision of the inputs, fp32 softmax: what a plain training loop does."""
    student = F.linear(problem.hidden, problem.weight).float()
    teacher = F.linear(problem.teacher_hidden, problem.teacher_weight).float()
    out = kd.reference.distill_logits(student, teacher, problem.targets, config=config)
    return gradients(out.loss, problem.leaves)


@pytest.mark.parametrize("close", [False, True], ids=["strangers", "teacher close to student"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_errs_less_than_eager_in_the_same_precision(
    divergence: str, dtype: torch.dtype, close: bool
) -> None:
    problem = make_problem(rows=61, width=33, teacher_width=33, vocab=203, dtype=dtype)
    if close:
        nudge = 1 + 0.02 * torch.randn(203, 33, generator=torch.Generator().manual_seed(1))
        problem.teacher_hidden = problem.hidden.detach().clone()
        problem.teacher_weight = (problem.weight.detach().float() * nudge).to(dtype)
    config = config_of(divergence, temperature=2.0, chunk_size=16, soft_weight=1, hard_weight=0)
    expected = problem.expected(config)
    wanted = gradients(expected.loss, problem.leaves)
    out = run(problem, config)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    found = gradients(out.loss, problem.leaves)
    for ours, theirs, truth in zip(found, naive_gradients(problem, config), wanted, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, truth) <= relative_error(theirs, truth)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_and_weight_may_differ_in_precision(weight_dtype: torch.dtype) -> None:
    hidden_dtype = torch.bfloat16 if weight_dtype == torch.float32 else torch.float32
    problem = make_problem(rows=31, dtype=torch.float32, bias=True)
    mixed = replace(
        problem,
        hidden=problem.hidden.detach().to(hidden_dtype).requires_grad_(),
        weight=problem.weight.detach().to(weight_dtype).requires_grad_(),
        teacher_weight=problem.teacher_weight.bfloat16(),
    )
    config = config_of("jsd", temperature=2.0)
    out, expected = run(mixed, config), mixed.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for leaf, ours, truth in zip(
        mixed.leaves, gradients(out.loss, mixed.leaves), gradients(expected.loss, mixed.leaves), strict=True
    ):
        assert ours.dtype == leaf.dtype
        # One rounding to bf16 (2^-9) of the gradient itself, and one of dZ where the weight is bf16.
        assert relative_error(ours, truth) < (1e-5 if leaf is mixed.bias else 4e-3)


def test_fp16_gradients_of_many_rows_do_not_underflow() -> None:
    """1 / num_items times a probability is far below fp16's smallest number."""
    problem = make_problem(dtype=torch.float16)
    out = run(problem, config_of(), num_items=2**20)
    grads = gradients(out.loss, problem.leaves, scale=2.0**20)  # as a loss scaler does
    for ours, truth in zip(grads, gradients(problem.expected(config_of()).loss, problem.leaves), strict=True):
        assert relative_error(ours, truth * out.num_valid) < 5e-3


# -- what needs no gradient ---------------------------------------------------------------------------------


def test_a_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    problem = make_problem(rows=40, width=6, vocab=37)
    problem.weight.requires_grad_(False)
    with NewTensors() as made:
        out = run(problem, config_of())
        out.loss.backward()
    assert (37, 6) not in made.shapes
    assert problem.weight.grad is None
    wanted = gradients(problem.expected(config_of()).loss, [problem.hidden])
    assert relative_error(problem.hidden.grad, wanted[0]) < 1e-12


def test_a_frozen_trunk_gets_no_gradient_and_no_buffer() -> None:
    problem = make_problem(rows=40, width=6, vocab=37, ignored=())
    problem.hidden.requires_grad_(False)
    with NewTensors() as made:
        out = run(problem, config_of())
        out.loss.backward()
    assert (40, 6) not in made.shapes
    assert problem.hidden.grad is None
    wanted = gradients(problem.expected(config_of()).loss, [problem.weight])
    assert relative_error(problem.weight.grad, wanted[0]) < 1e-12


def test_only_the_bias_is_trained() -> None:
    problem = make_problem(bias=True)
    problem.hidden.requires_grad_(False)
    problem.weight.requires_grad_(False)
    check(problem, config_of(), tolerance=1e-12)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(guard: type) -> None:
    problem = make_problem(rows=40, width=6, vocab=37)
    logits = [hidden @ weight.T for hidden, weight in ((problem.hidden, problem.weight), tuple(problem)[2:4])]
    wanted = run(problem, config_of()).loss.item()
    with guard(), NewTensors() as made:
        out = run(problem, config_of())
        dense = kd.distill_logits(*logits, problem.targets, config=config_of())
    assert out.loss.item() == pytest.approx(wanted, rel=1e-14)
    assert dense.loss.item() == pytest.approx(wanted, rel=1e-14)
    assert not out.loss.requires_grad
    assert made.shapes.isdisjoint({(37, 6), (40, 6), (40, 37)})


def test_training_after_inference_mode() -> None:
    problem = make_problem()
    release_workspace()
    with torch.inference_mode():
        run(problem, config_of())
    check(problem, config_of(), tolerance=1e-12)


def test_a_teacher_that_requires_gradients_gets_none() -> None:
    problem = make_problem(bias=True)
    teacher = (problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
    for tensor in teacher:
        tensor.requires_grad_()
    for loss in (kd.distill_loss, kd.reference.distill_loss):
        loss(*problem, config=config_of(), **problem.biases).loss.backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_without_soft_loss_the_teacher_is_never_read() -> None:
    problem = make_problem()
    config = config_of(soft_weight=0)
    broken = replace(
        problem,
        teacher_hidden=torch.full_like(problem.teacher_hidden, math.nan),
        teacher_weight=torch.full_like(problem.teacher_weight, math.nan)[:3],
    )
    absent = replace(problem, teacher_hidden=None, teacher_weight=None)
    outs = [run(p, config) for p in (problem, broken, absent)]
    wanted = problem.expected(config)
    for out in outs:
        assert out.loss.item() == outs[0].loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
        assert out.soft_loss.item() == 0


def test_without_hard_loss_labels_only_choose_rows() -> None:
    problem = make_problem()
    config = config_of(hard_weight=0)
    check(problem, config, tolerance=1e-12)
    other = torch.where(problem.targets == -100, -100, (problem.targets + 1) % 11)
    out, again = run(problem, config), run(replace(problem, targets=other), config)
    assert out.loss.item() == again.loss.item() and out.hard_loss.item() == 0


def test_without_metrics_the_loss_is_the_same() -> None:
    problem = make_problem()
    for temperature in (1.0, 2.0):
        with_metrics = run(problem, config_of("jsd", temperature=temperature))
        without = run(problem, config_of("jsd", temperature=temperature, metrics=False))
        assert without.loss.item() == pytest.approx(with_metrics.loss.item(), rel=1e-14)
        for pair in zip(
            gradients(without.loss, problem.leaves), gradients(with_metrics.loss, problem.leaves), strict=True
        ):
            assert relative_error(*pair) < 1e-14


# -- extreme logits -----------------------------------------------------------------------------------------


def logits_loss(
    student: Tensor, teacher: Tensor, config: kd.DistillConfig, targets: Tensor | None = None
) -> tuple[float, Tensor]:
    """(soft loss, gradient with respect to the student's logits)."""
    student = student.clone().requires_grad_()
    out = kd.distill_logits(student, teacher, targets, config=config)
    out.loss.backward()
    return out.soft_loss.item(), student.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_equal_to_the_student_gives_zero(divergence: str, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, vocab=211)
    same = replace(problem, teacher_hidden=problem.hidden.detach(), teacher_weight=problem.weight.detach())
    out = run(same, config_of(divergence, temperature=2.0, soft_weight=1, hard_weight=0))
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    # soft_ce keeps the teacher's entropy; the others are zero
    wanted = same.expected(config_of("soft_ce", temperature=2.0)).soft if divergence == "soft_ce" else 0.0
    assert out.soft_loss.item() == pytest.approx(wanted, abs=limit, rel=limit)
    for grad in gradients(out.loss, problem.leaves):
        assert grad.abs().max() < limit


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce", "jsd"])
def test_minus_infinity_in_the_teacher_is_probability_zero(divergence: str) -> None:
    problem = make_problem(ignored=())
    teacher = problem.teacher_hidden @ problem.teacher_weight.T
    teacher[:, 3] = -math.inf
    student = (problem.hidden @ problem.weight.T).detach()
    config = config_of(divergence, temperature=2.0, soft_weight=1, hard_weight=0)
    finite = torch.where(teacher.isinf(), -1e4, teacher)
    for found, wanted in zip(logits_loss(student, teacher, config), logits_loss(student, finite, config), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-12, atol=1e-14)


def test_minus_infinity_in_the_teacher_makes_reverse_kl_large_but_finite() -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    value, grad = logits_loss(student, teacher, config_of("reverse_kl", soft_weight=1, hard_weight=0))
    assert 1e3 < value < math.inf
    assert grad.isfinite().all() and grad[0, 2] > 0  # the student is pushed off the forbidden token


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_disjoint_one_hot_models_give_the_known_limits(beta: float) -> None:
    student, teacher = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([[-1e4, 1e4, -math.inf]])
    settings = {"soft_weight": 1, "hard_weight": 0, "beta": beta}
    value, grad = logits_loss(student, teacher, config_of("jsd", **settings))
    assert value == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), rel=1e-5)
    assert grad.abs().max() < 1e-6
    value, grad = logits_loss(student, teacher, config_of("forward_kl", **settings))
    assert value == pytest.approx(2e4, rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_one_hot_teacher_is_cross_entropy(divergence: str) -> None:
    problem = make_problem(ignored=())
    student = (problem.hidden @ problem.weight.T).detach()
    one_hot = torch.full_like(student, -1e4).scatter(1, problem.targets[:, None], 1e4)
    value, grad = logits_loss(student, one_hot, config_of(divergence, soft_weight=1, hard_weight=0))
    assert math.isfinite(value) and grad.isfinite().all()
    if divergence in ("forward_kl", "soft_ce"):
        assert value == pytest.approx(F.cross_entropy(student, problem.targets).item(), rel=1e-12)
        wanted = (student.softmax(-1) - F.one_hot(problem.targets, 11)) / 13
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand_stay_finite(divergence: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (1e4 * (2 * torch.rand(6, 9, generator=generator, dtype=dtype) - 1) for _ in range(2))
    config = config_of(divergence, soft_weight=1, hard_weight=1)
    value, grad = logits_loss(student, teacher, config, torch.arange(6))
    wanted = kd.reference.distill_logits(student.double(), teacher.double(), torch.arange(6), config=config)
    assert value == pytest.approx(wanted.soft_loss.item(), rel=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_vocabulary_of_one_token_teaches_nothing(divergence: str) -> None:
    problem = make_problem(vocab=1)
    out = run(problem, config_of(divergence, temperature=2.0))
    out.loss.backward()
    assert out.loss.item() == 0
    assert not problem.hidden.grad.any() and not problem.weight.grad.any()
