"""distill_loss against the fp64 oracle: values, gradients, and what may not change them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from tests.loss_cases import check, config_of, run
from tests.oracle import DIVERGENCES, chunk_sizes, gradients, make_problem, relative_error

NAN, INF = float("nan"), float("inf")
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_at_every_temperature_and_chunk_size(divergence: str, temperature: float) -> None:
    problem = make_problem(bias=True)
    for chunk_size in chunk_sizes(rows=9):  # nine of the 13 rows are valid
        config = config_of(divergence, temperature=temperature, chunk_size=chunk_size)
        check(problem, config, tolerance=1e-12)
        check(problem, config, tolerance=1e-12, scale=0.37)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_gradients_are_within_1e_5(divergence: str, temperature: float) -> None:
    problem = make_problem(rows=37, width=19, teacher_width=23, vocab=101, dtype=torch.float32, bias=True)
    check(problem, config_of(divergence, temperature=temperature, chunk_size=7), tolerance=1e-5, scale=0.37)


@pytest.mark.parametrize("power", [0, 1, 2, 0.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_power_scales_value_and_gradient(divergence: str, power: float) -> None:
    problem = make_problem()
    config = config_of(divergence, temperature=3.0, temperature_power=power, hard_weight=0)
    check(problem, config, tolerance=1e-12)
    plain = run(problem, config.model_copy(update={"temperature_power": 0}))
    out = run(problem, config)
    assert out.loss.item() == pytest.approx(3.0**power * plain.loss.item())
    for grad, unscaled in zip(gradients(out.loss, problem.leaves), gradients(plain.loss, problem.leaves), strict=True):
        assert relative_error(grad, 3.0**power * unscaled) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabularies_of_unequal_size_are_cut_to_the_shared_rows(divergence: str) -> None:
    for vocab, teacher_vocab in ((11, 14), (14, 11)):
        problem = make_problem(vocab=vocab, teacher_vocab=teacher_vocab, bias=True)
        check(problem, config_of(divergence), tolerance=1e-12)


IGNORED = {
    "none": (),
    "all": tuple(range(13)),
    "all but the first": tuple(range(1, 13)),
    "all but the last": tuple(range(12)),
    "every other": tuple(range(0, 13, 2)),
    "a whole chunk": (4, 5, 6, 7),
    "first and last": (0, 12),
}


@pytest.mark.parametrize("poison", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("pattern", IGNORED)
def test_ignored_rows_do_not_count_whatever_they_hold(pattern: str, poison: float) -> None:
    problem = make_problem(ignored=IGNORED[pattern], bias=True)
    config = config_of("jsd", temperature=2.0)
    clean = run(problem, config)
    wanted = gradients(clean.loss, problem.leaves)
    check(problem, config, tolerance=1e-12)

    rows = list(IGNORED[pattern])
    with torch.no_grad():
        problem.hidden[rows] = poison
        problem.teacher_hidden[rows] = poison
    out = run(problem, config)
    assert out.loss.item() == clean.loss.item()
    for grad, expected in zip(gradients(out.loss, problem.leaves), wanted, strict=True):
        assert torch.equal(grad, expected)
    assert not gradients(out.loss, problem.leaves)[0][rows].any()


def test_no_valid_row_gives_zero_with_a_graph() -> None:
    problem = make_problem(ignored=tuple(range(13)), bias=True)
    out = run(problem, config_of())
    assert out.loss.item() == 0 and out.num_valid.item() == 0
    out.loss.backward()
    for leaf in problem.leaves:
        assert leaf.grad is not None and not leaf.grad.any()


def test_no_row_at_all() -> None:
    problem = make_problem(rows=0, ignored=())
    out = run(problem, config_of())
    out.loss.backward()
    assert out.loss.item() == 0
    assert problem.hidden.grad.shape == (0, 5) and not problem.weight.grad.any()


def test_an_ignore_index_inside_the_vocabulary_is_ignored() -> None:
    problem = make_problem(vocab=51, ignored=(0, 3))
    problem.targets = torch.where(problem.targets == 42, 41, problem.targets)
    problem.targets[[0, 3, 7]] = 42
    config = config_of(ignore_index=42)
    assert run(problem, config).num_valid.item() == 10
    check(problem, config, tolerance=1e-12)


def test_without_targets_every_row_counts() -> None:
    problem = make_problem(ignored=())
    config = config_of(hard_weight=0)
    labelled = run(problem, config)
    problem.targets = None
    out = run(problem, config)
    assert out.num_valid.item() == 13 and out.loss.item() == labelled.loss.item()
    check(problem, config, tolerance=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunk_size_changes_nothing(divergence: str) -> None:
    problem = make_problem(rows=67, vocab=31, bias=True)
    whole = run(problem, config_of(divergence, temperature=2.0, chunk_size=1000))
    wanted = gradients(whole.loss, problem.leaves)
    for chunk_size in (1, 2, 5, 16, 63):
        out = run(problem, config_of(divergence, temperature=2.0, chunk_size=chunk_size))
        assert abs(out.loss.item() - whole.loss.item()) < 1e-12
        for grad, expected in zip(gradients(out.loss, problem.leaves), wanted, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str) -> None:
    problem = make_problem(rows=5, width=3, teacher_width=4, vocab=7, ignored=(1,), bias=True)
    config = config_of(divergence, temperature=2.0, chunk_size=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return run(replace(problem, hidden=hidden, weight=weight, bias=bias), config).loss

    assert torch.autograd.gradcheck(loss, tuple(problem.leaves))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "three dimensions", "transposed matrix"])
def test_the_layout_of_the_hidden_states_does_not_matter(layout: str) -> None:
    problem = make_problem(rows=12, ignored=(1, 5))
    trunk = problem.hidden.detach().clone()
    if layout == "transposed":  # [S, B, D] seen as [B, S, D]
        trunk = trunk.view(3, 4, 5).transpose(0, 1).contiguous().requires_grad_()
        hidden = trunk.transpose(0, 1)
    elif layout == "sliced":
        trunk = torch.cat([trunk, trunk], dim=1).requires_grad_()
        hidden = trunk[:, ::2]
    elif layout == "expanded":
        trunk = trunk[:1].clone().requires_grad_()
        hidden = trunk.expand(12, 5)
    elif layout == "three dimensions":
        trunk = trunk.view(3, 4, 5).requires_grad_()
        hidden = trunk * 1.0
    else:
        trunk = trunk.t().contiguous().requires_grad_()
        hidden = trunk.t()
    shape = hidden.shape[:-1]
    config = config_of("reverse_kl")
    dense = replace(problem, hidden=hidden.reshape(12, 5))
    wanted = gradients(dense.expected(config).loss, [trunk, problem.weight])
    out = kd.distill_loss(
        hidden,
        problem.weight,
        problem.teacher_hidden.view(*shape, 7),
        problem.teacher_weight,
        problem.targets.view(shape),
        config=config,
    )
    for grad, expected in zip(gradients(out.loss, [trunk, problem.weight]), wanted, strict=True):
        assert relative_error(grad, expected) < 1e-12


def test_backward_twice_gives_the_same_gradients() -> None:
    problem = make_problem(bias=True)
    out = run(problem, config_of())
    leaves = problem.leaves
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    first = [grad.clone() for grad in first]
    second = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    second = [grad.clone() for grad in second]
    third = torch.autograd.grad(0.37 * out.loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 0.37 * a, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_num_items_divides_value_and_gradient(num_items: int | float | Tensor) -> None:
    problem = make_problem()
    config = config_of()
    out, expected = run(problem, config, num_items=num_items), problem.expected(config, num_items=7)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert out.soft_loss.item() == pytest.approx(expected.soft, rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_num_items_of_zero_does_not_divide_by_zero() -> None:
    problem = make_problem(ignored=tuple(range(13)))
    for num_items in (0, torch.tensor(0)):
        out = run(problem, config_of(), num_items=num_items)
        out.loss.backward()
        assert out.loss.item() == 0 and not problem.weight.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_token_weights_multiply_rows_but_not_metrics(divergence: str) -> None:
    problem = make_problem(bias=True)
    weights = torch.linspace(0, 3, 13)
    check(problem, config_of(divergence, temperature=2.0), tolerance=1e-12, token_weights=weights)
    out = kd.reference.distill_loss(*problem, config=config_of(divergence), **problem.biases, token_weights=weights)
    for name, value in problem.expected(config_of(divergence)).metrics.items():
        assert out.metrics[name].item() == pytest.approx(value)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_agrees_with_the_oracle(divergence: str) -> None:
    problem = make_problem(vocab=11, teacher_vocab=14, bias=True)
    config = config_of(divergence, temperature=2.0)
    out, expected = kd.reference.distill_loss(*problem, config=config, **problem.biases), problem.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    out = run(make_problem(), config_of("jsd", temperature=2.0))
    assert out.loss.item() == pytest.approx(0.7 * out.soft_loss.item() + 0.4 * out.hard_loss.item(), rel=1e-14)
    assert out.loss.requires_grad
    assert not (out.soft_loss.requires_grad or out.hard_loss.requires_grad)
    assert not any(metric.requires_grad for metric in out.metrics.values())


def test_hard_loss_is_torchs_cross_entropy() -> None:
    problem = make_problem()
    logits = problem.hidden @ problem.weight.T
    wanted = F.cross_entropy(logits, problem.targets)
    out = run(problem, config_of(soft_weight=0, hard_weight=1))
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-14)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(wanted, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12
