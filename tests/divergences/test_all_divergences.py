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
from kd_plugin.divergences.measures import MEASURED
from tests.loss_cases import check, config_of, run
from tests.oracle import ALL_DIVERGENCES, DIVERGENCES, chunk_sizes, gradients, make_problem, relative_error

NEW = tuple(name for name in ALL_DIVERGENCES if name not in DIVERGENCES)
BY_ID = tuple(name for name in NEW if name != "uld")
SOFT_ONLY = {"soft_weight": 1, "hard_weight": 0, "alpha": 0.15}


def test_the_oracle_knows_every_built_in_divergence() -> None:
    assert set(ALL_DIVERGENCES) == set(registry.BUILT_IN)


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_the_reference_knows_every_built_in_divergence(name: str) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert kd.reference.divergence(name, logits, logits.flip(-1), beta=0.5, alpha=0.1).isfinite().all()


def test_a_divergence_without_a_reference_is_named() -> None:
    with pytest.raises(ValueError, match=r"'hellinger_2' is not registered, and `loss/reference\.py` has no formula"):
        kd.reference.divergence("hellinger_2", torch.zeros(1, 3), torch.zeros(1, 3), beta=0.5, alpha=0.1)


def test_reference_and_oracle_know_every_metric() -> None:
    problem = make_problem()
    config = config_of("forward_kl")
    assert set(kd.reference.distill_loss(*problem, config=config).metrics) == set(MEASURED)
    assert set(problem.expected(config).metrics) == set(MEASURED)


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
