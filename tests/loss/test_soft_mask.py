"""The soft loss on rows of its own: each loss is the mean over its rows, value and gradient as the oracle's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.per_token import TokenLosses
from tests.loss_cases import check, config_of, run
from tests.oracle import ALL_DIVERGENCES, Problem, gradients, make_problem, relative_error
from tests.refusals import refused

# Labels are missing in rows 1, 5, 6 and 12. Row 5 counts in the soft loss alone, 3 in the hard loss alone, 12 in none.
MASK = torch.ones(13, dtype=torch.bool)
MASK[[3, 12]] = False


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
def test_every_divergence_equals_the_oracle(divergence: str) -> None:
    for sizes in ((11, 11), (11, 14), (14, 9)):
        problem = make_problem(vocab=sizes[0], teacher_vocab=sizes[1], bias=True)
        for chunk_size in (1, 4, 64):
            config = config_of(divergence, temperature=2.0, label_smoothing=0.1, chunk_size=chunk_size)
            check(problem, config, 1e-12, scale=0.37, soft_mask=MASK)


@pytest.mark.parametrize(
    "divergence",
    ["jsd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forward_kl", "logit_mse_centered"))],
)
def test_compiled_too(divergence: str) -> None:
    problem = make_problem(vocab=14, teacher_vocab=9, bias=True)
    config = config_of(divergence, temperature=2.0, z_loss_weight=0.01, row_kernel="compile")
    check(problem, config, 1e-12, soft_mask=MASK)
    check(problem, config, 1e-12, soft_mask=MASK, token_weights=torch.linspace(0, 2, 13))


@pytest.mark.parametrize("options", [{}, {"token_weights": torch.linspace(0, 2, 13)}])
def test_numbers_of_items_divide_each_loss_by_its_own(options: dict[str, Tensor]) -> None:
    problem, config = make_problem(bias=True), config_of("reverse_kl", temperature=2.0)
    for items in ((5, 17), (torch.tensor(7), torch.tensor(3.0)), (0.5, 100)):
        check(problem, config, 1e-12, soft_mask=MASK, num_items=items[0], soft_items=items[1], **options)


@pytest.mark.parametrize("settings", [{"soft_weight": 0}, {"hard_weight": 0}, {"metrics": False}])
def test_parts_of_the_objective(settings: dict[str, object]) -> None:
    problem = make_problem()
    config = config_of(**settings)
    out, expected = run(problem, config, soft_mask=MASK), problem.expected(config, soft_mask=MASK)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    pairs = zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True)
    assert all(relative_error(*pair) <= 1e-12 for pair in pairs)


def test_rows_of_neither_loss_change_nothing_and_no_rows_give_no_loss() -> None:
    problem, config = make_problem(), config_of()
    before = run(problem, config, soft_mask=MASK)
    with torch.no_grad():
        problem.hidden[12] += 100
    assert run(problem, config, soft_mask=MASK).loss.item() == before.loss.item()
    assert before.num_valid == 12
    empty = make_problem(ignored=tuple(range(13)))
    out = run(empty, config, soft_mask=torch.zeros(13, dtype=torch.bool))
    assert out.loss.item() == 0 and all(not g.any() for g in gradients(out.loss, empty.leaves))
    check(empty, config, 1e-12, soft_mask=MASK)
    check(make_problem(), config, 1e-12, soft_mask=torch.zeros(13, dtype=torch.bool))


def test_without_targets_the_soft_loss_is_on_the_mask() -> None:
    problem, config = make_problem(), config_of(hard_weight=0)
    out = kd.distill_loss(*list(problem)[:4], None, config=config, soft_mask=MASK)
    expected = problem.expected(config, soft_mask=MASK)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)


@pytest.mark.parametrize("row_kernel", ["eager", "compile"])
def test_a_masked_token_is_no_label_of_a_row_without_one(row_kernel: str) -> None:
    """Token 0, which stands in for the missing label, has probability 0."""
    problem = make_problem(bias=True)
    problem.targets[problem.targets == 0] = 3
    for bias in (problem.bias, problem.teacher_bias):
        with torch.no_grad():
            bias[0] = -math.inf
    out = run(problem, config_of(row_kernel=row_kernel), soft_mask=MASK)
    assert out.loss.isfinite() and all(grad.isfinite().all() for grad in gradients(out.loss, problem.leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_gradient_of_few_labels(dtype: torch.dtype) -> None:
    problem = make_problem(rows=40, ignored=tuple(range(1, 40)), dtype=dtype)
    mask, config = torch.ones(40, dtype=torch.bool), config_of()
    exact = problem.exact()
    wanted = gradients(exact.expected(config, soft_mask=mask).loss, exact.leaves)
    found = gradients(run(problem, config, soft_mask=mask).loss, problem.leaves)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3 if dtype == torch.float16 else 3e-2
    assert all(relative_error(*pair) < tolerance for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_items": 5, "soft_items": 17}])
def test_the_dense_reference_is_the_same(options: dict[str, int]) -> None:
    problem = make_problem(vocab=14, teacher_vocab=9, bias=True)
    config = config_of("jsd", temperature=2.0, label_smoothing=0.1)
    found = kd.reference.distill_loss(*problem, config=config, soft_mask=MASK, **problem.biases, **options)
    expected = problem.expected(config, soft_mask=MASK, **options)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert (found.soft_loss.item(), found.hard_loss.item()) == pytest.approx((expected.soft, expected.hard), rel=1e-12)
    assert found.num_valid == expected.num_valid == 12
    pairs = zip(gradients(found.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True)
    assert all(relative_error(*pair) < 1e-12 for pair in pairs)


def per_token(problem: Problem, config: kd.DistillConfig) -> TokenLosses:
    return kd.distill_loss_per_token(*problem, config=config, soft_mask=MASK, **problem.biases)


def test_per_token_each_loss_is_0_outside_its_rows() -> None:
    problem, config = make_problem(vocab=14, teacher_vocab=9, bias=True), config_of("jsd", temperature=2.0)
    losses = per_token(problem, config)
    assert torch.equal(losses.soft_loss != 0, MASK)
    assert torch.equal(losses.hard_loss != 0, problem.targets != -100)
    factors = torch.linspace(-2, 3, 13).double()
    found = gradients((factors * losses.loss).sum(), problem.leaves)
    given = {"token_weights": factors, "num_items": 1, "soft_items": 1, "soft_mask": MASK}
    expected = problem.expected(config, **given)
    for pair in zip(found, gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_a_head_takes_the_mask_too() -> None:
    problem, config = make_problem(), config_of("jsd")
    linear = torch.nn.Linear(5, 11, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(problem.weight)
    head = kd.DistillHead(linear, config)
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    for options in ({}, {"num_items": 4, "soft_items": 20}):
        out = head(problem.hidden, problem.targets, teacher=teacher, soft_mask=MASK, **options)
        expected = problem.expected(config, soft_mask=MASK, **options)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        (found,) = torch.autograd.grad(out.loss, head.weight)
        assert relative_error(found, gradients(expected.loss, problem.leaves)[1]) < 1e-12


def test_what_is_not_said_is_refused() -> None:
    problem, everywhere = make_problem(), config_of(soft_on="all")
    refused(lambda: run(problem, everywhere), "soft_on is all", "pass soft_mask", "(13,)", "soft_on=trained")
    refused(lambda: per_token_without(problem, everywhere), "soft_on is all", "pass soft_mask")
    assert run(problem, everywhere, soft_mask=MASK).num_valid == 12
    assert run(problem, config_of(soft_on="all", soft_weight=0)).num_valid == 9
    refused(lambda: run(problem, config_of(), soft_mask=MASK.long()), "soft_mask is torch.int64", "torch.bool (13,)")
    refused(lambda: run(problem, config_of(), soft_mask=MASK[1:]), "soft_mask is torch.bool (12,)")
    refused(lambda: run(problem, config_of(), soft_mask=MASK, num_items=3), "num_items", "without soft_items")
    refused(lambda: run(problem, config_of(), soft_mask=MASK, soft_items=3), "soft_items", "without num_items")
    refused(lambda: run(problem, config_of(), soft_items=3), "soft_items is given without soft_mask", "leave it out")
    logits = problem.hidden @ problem.weight.T
    refused(
        lambda: kd.distill_logits(logits, logits, problem.targets, config=everywhere), "soft_on is all", "soft_mask"
    )


def per_token_without(problem: Problem, config: kd.DistillConfig) -> TokenLosses:
    return kd.distill_loss_per_token(*problem, config=config)
