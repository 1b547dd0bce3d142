"""What Hinton et al. (arXiv:1503.02531) say of distillation: the limit of high temperature, and soft targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.oracle import relative_error
from tests.reference_values import HINTON_LIMIT, S, T

SOFT_ONLY = {"soft_weight": 1, "hard_weight": 0}


def loss_and_gradient(student: Tensor, teacher: Tensor, divergence: str, **settings: object) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    out = kd.distill_logits(leaf, teacher, config=config_of(divergence, **{**SOFT_ONLY, **settings}))
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.item(), gradient


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_temperature_squared_kl_tends_to_matching_centred_logits(divergence: str) -> None:
    """Value: half the squared distance over V. Gradient: distance over V. The error falls as 1 / T."""
    limit = (centred(S) - centred(T)).square().sum(-1).mean().item() / (2 * 4)
    assert limit == pytest.approx(HINTON_LIMIT, abs=1e-6)
    limit_gradient = (centred(S) - centred(T)) / (4 * 8)  # V classes, mean over 8 rows
    errors, gradient_errors = [], []
    for temperature in (10.0, 100.0, 1000.0):
        value, gradient = loss_and_gradient(S, T, divergence, temperature=temperature)
        errors.append(abs(value - limit))
        gradient_errors.append(relative_error(gradient, limit_gradient))
    for series in (errors, gradient_errors):
        assert series[1] < series[0] / 5 and series[2] < series[1] / 5
    assert errors[2] < 1e-4 and gradient_errors[2] < 1e-3


def test_the_limit_is_the_divergence_called_centred_logit_matching() -> None:
    value, gradient = loss_and_gradient(S, T, "logit_mse_centered", soft_weight=1 / 4)
    hot_value, hot_gradient = loss_and_gradient(S, T, "forward_kl", temperature=1e4)
    assert value == pytest.approx(HINTON_LIMIT, abs=1e-6)
    assert hot_value == pytest.approx(value, rel=1e-4)
    assert relative_error(hot_gradient, gradient) < 1e-3


def test_centred_and_plain_matching_agree_on_logits_of_mean_zero() -> None:
    student, teacher = centred(S), centred(T)
    plain, centred_loss = (loss_and_gradient(student, teacher, n) for n in ("logit_mse", "logit_mse_centered"))
    assert plain[0] == pytest.approx(centred_loss[0], rel=1e-12)
    assert relative_error(plain[1], centred_loss[1]) < 1e-12


def test_without_the_square_of_the_temperature_the_gradient_vanishes() -> None:
    with_square = loss_and_gradient(S, T, "forward_kl", temperature=100.0)[1]
    without = loss_and_gradient(S, T, "forward_kl", temperature=100.0, temperature_power=0)[1]
    assert relative_error(1e4 * without, with_square) < 1e-10
    assert without.norm() < 1e-3 * loss_and_gradient(S, T, "forward_kl")[1].norm()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_soft_cross_entropy_differ_by_the_teachers_entropy(temperature: float) -> None:
    kl, kl_gradient = loss_and_gradient(S, T, "forward_kl", temperature=temperature)
    soft_ce, gradient = loss_and_gradient(S, T, "soft_ce", temperature=temperature)
    assert torch.equal(kl_gradient, gradient)
    p = (T / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert soft_ce - kl == pytest.approx(temperature**2 * entropy, rel=1e-12)
    assert entropy > 1


def test_soft_and_hard_part_are_one_cross_entropy_against_a_mixed_target() -> None:
    """0.7 KL + 0.3 CE has the gradient of the cross-entropy against 0.7 p + 0.3 onehot."""
    targets = torch.arange(8) % 4
    leaf = S.clone().requires_grad_()
    out = kd.distill_logits(leaf, T, targets, config=config_of("forward_kl", soft_weight=0.7, hard_weight=0.3))
    (found,) = torch.autograd.grad(out.loss, leaf)
    mixed = 0.7 * T.softmax(-1) + 0.3 * torch.nn.functional.one_hot(targets, 4).double()
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, mixed), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_where_cross_entropy_and_kl_look() -> None:
    """Shares of the summands' absolute values per class: the rare classes weigh more in the KL."""
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ([0.98, 0.01, 0.01], [0.979, 0.02, 0.001]))
    summands = {"soft_ce": -p * q.log(), "forward_kl": p * (p.log() - q.log())}
    for name, published in (("soft_ce", (16.12, 30.33, 53.55)), ("forward_kl", (3.23, 22.39, 74.38))):
        shares = 100 * summands[name].abs() / summands[name].abs().sum()
        assert shares[0].tolist() == pytest.approx(published, abs=0.01)
        assert loss_and_gradient(q.log(), p.log(), name)[0] == pytest.approx(summands[name].sum().item(), rel=1e-12)
