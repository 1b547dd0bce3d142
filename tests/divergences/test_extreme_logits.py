"""What divergences are at the edges, and what they are to each other: closed forms of extreme logits, identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from tests import oracle
from tests.loss_cases import config_of, run
from tests.oracle import ALL_DIVERGENCES, DIVERGENCES, gradients, make_problem, relative_error

NEW = tuple(name for name in ALL_DIVERGENCES if name not in DIVERGENCES)
OF_PROBABILITIES = ("skew_kl", "skew_reverse_kl", "tvd", "acceptance", "uld")
SOFT_ONLY = {"soft_weight": 1, "hard_weight": 0, "alpha": 0.15}


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
