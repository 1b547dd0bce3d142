"""The other eight divergences as thoroughly as the first four, and the identities that hold between all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.divergences import registry
from tests import oracle
from tests.loss_cases import check, config_of, run
from tests.oracle import ALL_DIVERGENCES, DIVERGENCES, chunk_sizes, gradients, make_problem, relative_error

NEW = tuple(name for name in ALL_DIVERGENCES if name not in DIVERGENCES)
BY_ID = tuple(name for name in NEW if name != "uld")
OF_PROBABILITIES = ("skew_kl", "skew_reverse_kl", "tvd", "acceptance", "uld")
SOFT_ONLY = {"soft_weight": 1, "hard_weight": 0, "alpha": 0.15}


def test_the_oracle_knows_every_built_in_divergence() -> None:
    assert set(ALL_DIVERGENCES) == set(registry.BUILT_IN)


# -- against the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", NEW)
def test_values_and_gradients_at_every_temperature_and_chunk_size(divergence: str, temperature: float) -> None:
    problem = make_problem(bias=True)
    for chunk_size in chunk_sizes(rows=9):
        config = config_of(divergence, temperature=temperature, chunk_size=chunk_size, alpha=0.15)
        check(problem, config, tolerance=1e-12, scale=0.37)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.85])
@pytest.mark.parametrize("divergence", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_shares_of_the_mixture(divergence: str, share: float) -> None:
    """`jsd` by beta, the others by alpha; the one must not be taken for the other."""
    problem = make_problem()
    name, other = ("beta", "alpha") if divergence == "jsd" else ("alpha", "beta")
    config = config_of(divergence, **{name: share, other: 0.7}, temperature=2.0)
    check(problem, config, tolerance=1e-12)
    assert run(problem, config).loss.item() == run(problem, config.model_copy(update={other: 0.2})).loss.item()


@pytest.mark.parametrize("share", [1e-6, 1e-9, 0.999999, 1 - 1e-9])
@pytest.mark.parametrize("divergence", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_shares_next_to_0_and_1_do_not_overflow_fp32(divergence: str, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (6 * torch.randn(6, 50, generator=generator) for _ in range(2))
    value, grad = logits_loss(divergence, student, teacher, beta=share, alpha=share)
    leaf = student.double().requires_grad_()
    (wanted,) = torch.autograd.grad(_expected(divergence, leaf, teacher, beta=share, alpha=share), leaf)
    assert math.isfinite(value)
    assert relative_error(grad, wanted) < (1e-5 if share < 0.5 or divergence == "jsd" else 1e-2)  # tiny gradients


@pytest.mark.parametrize("divergence", NEW)
def test_fp32_gradients_are_within_1e_5(divergence: str) -> None:
    problem = make_problem(rows=37, width=19, teacher_width=23, vocab=101, dtype=torch.float32, bias=True)
    for temperature in (0.5, 1.0, 2.0, 4.0):
        check(problem, config_of(divergence, temperature=temperature, chunk_size=7), tolerance=1e-5, scale=0.37)


@pytest.mark.parametrize("power", [0, 1, 2.5])
@pytest.mark.parametrize("divergence", NEW)
def test_temperature_power_scales_value_and_gradient(divergence: str, power: float) -> None:
    """Also where the divergence itself does not change with temperature squared."""
    check(make_problem(), config_of(divergence, temperature=3.0, temperature_power=power, hard_weight=0), 1e-12)


@pytest.mark.parametrize("divergence", NEW)
def test_gradcheck(divergence: str) -> None:
    problem = make_problem(rows=5, width=3, teacher_width=4, vocab=7, ignored=(1,), bias=True)
    config = config_of(divergence, temperature=2.0, chunk_size=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return run(replace(problem, hidden=hidden, weight=weight, bias=bias), config).loss

    assert torch.autograd.gradcheck(loss, tuple(problem.leaves))


@pytest.mark.parametrize("divergence", NEW)
def test_chunk_size_changes_nothing(divergence: str) -> None:
    problem = make_problem(rows=67, vocab=31, bias=True)
    whole = run(problem, config_of(divergence, temperature=2.0, chunk_size=1000))
    wanted = gradients(whole.loss, problem.leaves)
    for chunk_size in (1, 2, 5, 16, 62, 63):
        out = run(problem, config_of(divergence, temperature=2.0, chunk_size=chunk_size))
        assert abs(out.loss.item() - whole.loss.item()) < 1e-12
        for grad, expected in zip(gradients(out.loss, problem.leaves), wanted, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(11, 14), (14, 11)])
@pytest.mark.parametrize("divergence", NEW)
def test_vocabularies_of_unequal_size(divergence: str, vocab: int, teacher_vocab: int) -> None:
    """Cut to the shared rows; only uld compares them whole."""
    problem = make_problem(vocab=vocab, teacher_vocab=teacher_vocab, bias=True)
    for chunk_size in (1, 4, 9):
        check(problem, config_of(divergence, chunk_size=chunk_size, temperature=2.0), tolerance=1e-12)


@pytest.mark.parametrize("divergence", NEW)
def test_ignored_rows_may_hold_nan_and_weights_multiply_rows(divergence: str) -> None:
    problem = make_problem(bias=True)
    with torch.no_grad():
        clean = problem.hidden.detach().clone()
        problem.hidden[[1, 5]] = math.nan
        problem.teacher_hidden[[1, 12]] = math.nan
    config, weights = config_of(divergence, temperature=2.0), torch.linspace(0, 3, 13)
    found = gradients(run(problem, config, token_weights=weights).loss, problem.leaves)
    problem.hidden = clean.requires_grad_()
    problem.teacher_hidden = problem.teacher_hidden.nan_to_num(0.0)
    expected = problem.expected(config, token_weights=weights)
    for grad, wanted in zip(found, gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(grad, wanted) < 1e-12


@pytest.mark.parametrize("divergence", NEW)
def test_the_reference_agrees_with_the_oracle(divergence: str) -> None:
    problem = make_problem(vocab=11, teacher_vocab=14, bias=True)
    config = config_of(divergence, temperature=2.0, label_smoothing=0.1, z_loss_weight=0.01)
    out, expected = kd.reference.distill_loss(*problem, config=config, **problem.biases), problem.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


EVERY_TERM = [{"name": name, "weight": 0.3 + 0.1 * i, "temperature": 1 + i % 2} for i, name in enumerate(BY_ID)]


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param({"divergence": "uld"}, id="uld"),  # cannot be mixed with the others
        pytest.param({"terms": EVERY_TERM}, id="all others", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_the_compiled_kernel_equals_the_oracle(objective: dict[str, Any]) -> None:
    """All of them in two graphs."""
    config = kd.DistillConfig(**objective, soft_weight=0.7, hard_weight=0.4, alpha=0.15, row_kernel="compile")
    for vocab, teacher_vocab in ((11, 14), (14, 11)):
        problem = make_problem(vocab=vocab, teacher_vocab=teacher_vocab, bias=True)
        for chunk_size in (1, 4, 64):
            check(problem, config.model_copy(update={"chunk_size": chunk_size}), tolerance=1e-11, scale=0.37)


# -- extremes -----------------------------------------------------------------------------------------------


def logits_loss(divergence: str, student: Tensor, teacher: Tensor, **settings: object) -> tuple[float, Tensor]:
    """(soft loss, its gradient with respect to the student's logits)."""
    student = student.clone().requires_grad_()
    out = kd.distill_logits(student, teacher, config=config_of(divergence, **{**SOFT_ONLY, **settings}))
    out.loss.backward()
    return out.soft_loss.item(), student.grad


def random_logits(rows: int = 7, vocab: int = 13, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(2 * torch.randn(rows, vocab, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", NEW)
def test_a_teacher_equal_to_the_student_gives_zero(divergence: str, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, vocab=211)
    same = replace(problem, teacher_hidden=problem.hidden.detach(), teacher_weight=problem.weight.detach())
    out = run(same, config_of(divergence, temperature=2.0, **SOFT_ONLY))
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    assert abs(out.soft_loss.item()) < limit
    for grad in gradients(out.loss, problem.leaves):
        assert grad.abs().max() < limit


INFINITE = {("forward_kl", "student"), ("soft_ce", "student"), ("reverse_kl", "teacher")}  # mass against none
CASES = {(name, side) for name in ALL_DIVERGENCES for side in ("teacher", "student", "both")} - INFINITE


@pytest.mark.parametrize(("divergence", "side"), sorted(CASES))
def test_minus_infinity_is_probability_zero(divergence: str, side: str) -> None:
    student, teacher = random_logits()  # distances of logits leave such a token out
    for name, logits in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            logits[:, 3] = logits[2, 5:] = -math.inf
    value, grad = logits_loss(divergence, student, teacher, temperature=2.0)
    leaf = student.clone().requires_grad_()
    expected = _expected(divergence, leaf, teacher, temperature=2.0)
    (wanted,) = torch.autograd.grad(expected, leaf)
    assert value == pytest.approx(expected.item(), rel=1e-11)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-13)
    assert not grad[student.isinf()].any()


def _expected(divergence: str, student: Tensor, teacher: Tensor, **settings: object) -> Tensor:
    return oracle.distill_logits(student, teacher, None, config_of(divergence, **{**SOFT_ONLY, **settings})).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", NEW)
def test_logits_of_ten_thousand(divergence: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (1e4 * (2 * torch.rand(6, 9, generator=generator, dtype=dtype) - 1) for _ in range(2))
    value, grad = logits_loss(divergence, student, teacher)
    assert math.isfinite(value) and grad.isfinite().all()
    expected = oracle.divergence(divergence, student.double(), teacher.double(), alpha=0.15)
    if divergence == "acceptance":  # infinite where the models share no token, were it not for the floor
        expected = expected.clamp_max(-math.log(1e-30))
    assert value == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("divergence", OF_PROBABILITIES)
def test_a_one_hot_teacher(divergence: str) -> None:
    student, _ = random_logits()
    targets = torch.arange(7)
    one_hot = torch.full_like(student, -1e4).scatter(1, targets[:, None], 1e4)
    value, grad = logits_loss(divergence, student, one_hot)
    q = student.softmax(-1)
    hit = q[targets, targets]
    closed = {
        "skew_kl": -(0.15 + 0.85 * hit).log(),
        "skew_reverse_kl": hit * (hit / (0.85 + 0.15 * hit)).log() + (1 - hit) * math.log(1 / 0.15),
        "tvd": 1 - hit,
        "acceptance": -hit.log(),
        "uld": 1 - q.max(-1).values + (q.sum(-1) - q.max(-1).values),
    }
    assert value == pytest.approx(closed[divergence].mean().item(), rel=1e-12)
    leaf = student.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(_expected(divergence, leaf, one_hot), leaf)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-14)


# -- identities ---------------------------------------------------------------------------------------------


def test_jsd_of_equal_shares_is_symmetric_and_at_most_ln_2() -> None:
    student, teacher = random_logits()
    there, back = (logits_loss("jsd", *pair, beta=0.5)[0] for pair in ((student, teacher), (teacher, student)))
    assert there == pytest.approx(back, rel=1e-12) and 0 < there < math.log(2)
    for factor in (10, 1e3):  # ever more disjoint
        value = logits_loss("jsd", factor * student, -factor * student, beta=0.5)[0]
        assert there < value <= math.log(2) * (1 + 1e-12)


@pytest.mark.parametrize("divergence", ["tvd", "cosine", "logit_mse", "logit_mse_centered", "uld"])
def test_distances_are_symmetric(divergence: str) -> None:
    student, teacher = random_logits()
    there, back = (logits_loss(divergence, *pair)[0] for pair in ((student, teacher), (teacher, student)))
    assert there == pytest.approx(back, rel=1e-12)


def test_tvd_and_acceptance_rate_sum_to_one() -> None:
    student, teacher = random_logits()
    for row in range(7):
        pair = student[row : row + 1], teacher[row : row + 1]
        out = kd.distill_logits(*pair, config=config_of("tvd", **SOFT_ONLY))
        rate = out.metrics["acceptance_rate"].item()
        assert out.soft_loss.item() + rate == pytest.approx(1, rel=1e-12)
        assert logits_loss("acceptance", *pair)[0] == pytest.approx(-math.log(rate), rel=1e-12)


@pytest.mark.parametrize(("skewed", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skewed_divergences_tend_to_the_plain_ones(skewed: str, plain: str) -> None:
    student, teacher = random_logits()
    value, grad = logits_loss(plain, student, teacher)
    errors = []
    for alpha in (1e-2, 1e-4, 1e-8):
        skewed_value, skewed_grad = logits_loss(skewed, student, teacher, alpha=alpha)
        assert 0 < skewed_value < value
        errors.append((value - skewed_value, float((grad - skewed_grad).abs().max())))
    assert errors[0] > errors[1] > errors[2]
    assert max(errors[2]) < 1e-5


def test_half_skewed_divergences_are_the_parts_of_jsd() -> None:
    student, teacher = random_logits()
    parts = [logits_loss(name, student, teacher, alpha=0.5)[0] for name in ("skew_kl", "skew_reverse_kl")]
    assert logits_loss("jsd", student, teacher, beta=0.5)[0] == pytest.approx(sum(parts) / 2, rel=1e-12)


def test_uld_does_not_care_which_token_is_which() -> None:
    student, teacher = random_logits()
    generator = torch.Generator().manual_seed(2)
    value, grad = logits_loss("uld", student, teacher)
    order, other = (torch.randperm(13, generator=generator) for _ in range(2))
    shuffled_value, shuffled_grad = logits_loss("uld", student[:, order], teacher[:, other])
    assert shuffled_value == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(shuffled_grad, grad[:, order], rtol=1e-12, atol=1e-15)
    assert 0 < value <= 2 * logits_loss("tvd", student, teacher)[0]
    padded = torch.cat([teacher, torch.full((7, 4), -math.inf, dtype=torch.float64)], dim=1)
    assert logits_loss("uld", student, padded)[0] == pytest.approx(value, rel=1e-12)


def test_what_each_distance_of_logits_ignores() -> None:
    student, teacher = random_logits()
    shifted, scaled = teacher + torch.arange(7.0)[:, None], 3 * teacher
    centred, cosine = (logits_loss(name, student, teacher)[0] for name in ("logit_mse_centered", "cosine"))
    assert logits_loss("logit_mse_centered", student, shifted)[0] == pytest.approx(centred, rel=1e-12)
    assert logits_loss("cosine", student, scaled)[0] == pytest.approx(cosine, rel=1e-12)
    assert logits_loss("logit_mse", student, shifted)[0] > 1.01 * logits_loss("logit_mse", student, teacher)[0]
    mean_zero = [logits - logits.mean(-1, keepdim=True) for logits in (student, teacher)]
    assert logits_loss("logit_mse", *mean_zero)[0] == pytest.approx(centred, rel=1e-12)
