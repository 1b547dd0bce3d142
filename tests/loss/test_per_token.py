"""One loss per token, with a gradient for each, still without tokens times vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss import matmul
from kd_plugin.loss.per_token import TokenLosses
from tests.allocations import NewTensors
from tests.loss_cases import config_of, run
from tests.oracle import ALL_DIVERGENCES, Expected, Problem, gradients, make_problem, relative_error


def per_token(problem: Problem, config: kd.DistillConfig) -> TokenLosses:
    return kd.distill_loss_per_token(*problem, config=config, **problem.biases)


def rows_alone(problem: Problem, config: kd.DistillConfig) -> list[Expected]:
    """The oracle's loss of each row by itself; 0 for an ignored one."""
    rows = len(problem.hidden)
    return [problem.expected(config, token_weights=one, num_items=1) for one in torch.eye(rows)]


@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
def test_each_row_equals_the_oracles(divergence: str) -> None:
    problem = make_problem(bias=True)
    config = config_of(divergence, temperature=2.0, label_smoothing=0.1)
    rows = rows_alone(problem, config)
    wanted = [[row.loss.item() for row in rows], [row.soft for row in rows], [row.hard for row in rows]]
    assert wanted[0][1] == wanted[0][12] == 0 < min(wanted[0][2:5])
    for chunk_size in (1, 4, 64):
        losses = per_token(problem, config.model_copy(update={"chunk_size": chunk_size}))
        for found, expected in zip(losses, wanted, strict=True):
            torch.testing.assert_close(
                found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
            )


@pytest.mark.parametrize(
    ("divergence", "row_kernel"),
    [("forward_kl", "eager"), ("acceptance", "eager"), ("uld", "eager"), ("forward_kl", "compile")],
)
def test_any_factor_per_token_reaches_the_gradient(divergence: str, row_kernel: str) -> None:
    """Positive, negative, zero; the factors of ignored rows do nothing."""
    problem = make_problem(vocab=11, teacher_vocab=14, bias=True)
    factors = torch.linspace(-2, 3, 13).double()
    factors[3] = 0
    for chunk_size in (1, 4, 64):
        config = config_of(divergence, temperature=2.0, chunk_size=chunk_size, row_kernel=row_kernel)
        found = gradients((factors * per_token(problem, config).loss).sum(), problem.leaves)
        expected = problem.expected(config, token_weights=factors, num_items=1)
        for pair in zip(found, gradients(expected.loss, problem.leaves), strict=True):
            assert relative_error(*pair) < 1e-12


def test_factors_may_depend_on_the_losses() -> None:
    """As in focal losses: differentiable through the product."""
    problem = make_problem(rows=5, ignored=(2,), vocab=7)
    config = config_of("jsd")

    def focal(hidden: Tensor, weight: Tensor) -> Tensor:
        changed = replace(problem, hidden=hidden, weight=weight)
        losses = per_token(changed, config).loss
        return (losses * losses.tanh()).sum()

    assert torch.autograd.gradcheck(focal, (problem.hidden, problem.weight))


def test_the_mean_over_valid_rows_is_the_plain_loss() -> None:
    problem = make_problem(bias=True)
    config = config_of("reverse_kl", temperature=2.0)
    losses, plain = per_token(problem, config), run(problem, config)
    mean = losses.loss.sum() / plain.num_valid
    assert mean.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    for pair in zip(gradients(mean, problem.leaves), gradients(plain.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_shapes_parts_and_what_is_differentiable() -> None:
    problem = make_problem(rows=12, ignored=(1, 5))
    config = config_of()
    cube = kd.distill_loss_per_token(
        problem.hidden.view(3, 4, 5),
        problem.weight,
        problem.teacher_hidden.view(3, 4, 7),
        problem.teacher_weight,
        problem.targets.view(3, 4),
        config=config,
    )
    flat = per_token(problem, config)
    for found, wanted in zip(cube, flat, strict=True):
        assert found.shape == (3, 4) and torch.equal(found.flatten(), wanted)
    torch.testing.assert_close(flat.loss, 0.7 * flat.soft_loss + 0.4 * flat.hard_loss, rtol=1e-14, atol=0)
    assert flat.loss.requires_grad and not (flat.soft_loss.requires_grad or flat.hard_loss.requires_grad)
    with torch.no_grad():
        assert not per_token(problem, config).loss.requires_grad


def test_ignored_rows_are_zero_whatever_they_hold() -> None:
    problem = make_problem(ignored=(1, 5))
    with torch.no_grad():
        problem.hidden[[1, 5]] = math.nan
    losses = per_token(problem, config_of())
    assert not any(values[[1, 5]].any() for values in losses)
    grad_hidden, grad_weight = gradients(losses.loss.sum(), problem.leaves)
    assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()
    assert not grad_hidden[[1, 5]].any() and grad_hidden[[0, 2]].all()


def test_no_valid_row_gives_zeros_with_a_graph() -> None:
    problem = make_problem(ignored=tuple(range(13)))
    losses = per_token(problem, config_of())
    losses.loss.sum().backward()
    assert not losses.loss.any() and not problem.hidden.grad.any() and not problem.weight.grad.any()


def test_only_what_needs_a_gradient_gets_one() -> None:
    problem = make_problem(rows=40, width=6, vocab=37)
    problem.weight.requires_grad_(False)
    config = config_of()
    with NewTensors() as made:
        per_token(problem, config).loss.mean().backward()
    assert problem.weight.grad is None and (37, 6) not in made.shapes
    (wanted,) = gradients(problem.expected(config, num_items=40).loss, [problem.hidden])
    assert relative_error(problem.hidden.grad, wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    problem = make_problem(rows=61, width=33, teacher_width=33, vocab=203, dtype=dtype)
    config, factors = config_of("jsd", chunk_size=16), torch.linspace(-1, 2, 61)
    losses = per_token(problem, config)
    assert losses.loss.dtype == torch.float32
    wide = problem.exact()
    expected = wide.expected(config, token_weights=factors, num_items=1)
    assert (losses.loss * factors).sum().item() == pytest.approx(expected.loss.item(), rel=1e-5)
    found = gradients((losses.loss * factors).sum(), problem.leaves)
    for pair in zip(found, gradients(expected.loss, wide.leaves), strict=True):
        assert relative_error(*pair) < 5e-3


def test_small_factors_leave_fp16_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat distributions over many tokens: times 2 ** -12, no element of the logits' gradient is an fp16 number."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: True)
    problem = make_problem(rows=9, width=8, teacher_width=8, vocab=4096, dtype=torch.float16, ignored=())
    problem.hidden.data *= 0.1
    problem.weight.requires_grad_(False)
    (found,) = gradients(per_token(problem, config_of(hard_weight=0.0)).loss.sum() * 2**-12, problem.leaves)
    wide = problem.exact()
    expected = wide.expected(config_of(hard_weight=0.0), num_items=1)
    (wanted,) = gradients(expected.loss * 2**-12, wide.leaves)
    assert relative_error(found, wanted) < 0.1


def test_memory_stays_that_of_one_chunk() -> None:
    problem = make_problem(640, 8, 8, 1021, dtype=torch.float32, ignored=tuple(range(0, 640, 3)))
    with NewTensors() as made:
        per_token(problem, config_of(chunk_size=32)).loss.square().mean().backward()
    assert max(made.numels.values()) <= 32 * 1021


def test_bad_input_is_refused_as_by_distill_loss() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="targets"):
        kd.distill_loss_per_token(*tuple(problem)[:4], problem.targets[1:], config=config_of())
    problem.targets[0] = 11
    with pytest.raises(ValueError, match="target 11 lies outside the vocabulary of 11"):
        per_token(problem, config_of())
