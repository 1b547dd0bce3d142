"""The closed-form definitions themselves, against autograd and the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_plugin.divergences import registry
from kd_plugin.divergences.definition import LOG_FLOOR, Divergence, Row
from kd_plugin.divergences.registry import DIVERGENCES
from tests import oracle

NON_NEGATIVE = ("forward_kl", "reverse_kl", "jsd")


def row_of(student: Tensor, teacher: Tensor) -> Row:
    """`[n, V]` logits, already divided by the temperature."""
    log_q, log_p = (logits.log_softmax(-1).clamp_min(LOG_FLOOR) for logits in (student, teacher))
    return Row(student, teacher, log_q, log_p, log_q.exp(), log_p.exp(), student.shape[-1])


def value_of(definition: Divergence, row: Row) -> Tensor:
    return definition.value(torch, sums_of(definition, row))[:, 0]


def sums_of(definition: Divergence, row: Row) -> tuple[Tensor, ...]:
    return tuple(elements.sum(-1, keepdim=True) for elements in definition.elements(torch, row))


def random_logits(rows: int = 20, vocab: int = 13, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(rows, vocab, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_value_and_gradient_equal_the_oracles(name: str, beta: float) -> None:
    student, teacher = random_logits()
    student.requires_grad_()
    definition = registry.get(name, beta=beta)
    row = row_of(student.detach(), teacher)
    expected = torch.stack([oracle.divergence(name, s, t, beta) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(value_of(definition, row), expected.detach(), rtol=1e-12, atol=1e-14)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    found = definition.gradient(torch, row, sums_of(definition, row))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_closed_form_gradient_is_that_of_the_value(name: str) -> None:
    student, teacher = random_logits()
    student.requires_grad_()
    definition = registry.get(name, beta=0.3, alpha=0.2)
    row = row_of(student, teacher)
    (wanted,) = torch.autograd.grad(value_of(definition, row).sum(), student)
    fixed = row_of(student.detach(), teacher)
    found = definition.gradient(torch, fixed, sums_of(definition, fixed))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_definitions_say_what_they_are(name: str) -> None:
    definition = registry.get(name)
    assert definition.name == name
    assert definition.formula and definition.gradient_formula and definition.source
    assert registry.get(name) == definition and hash(registry.get(name)) == hash(definition)


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_every_element_of_the_sum_is_non_negative(name: str) -> None:
    """So that rounding cannot push the sum of a large vocabulary below zero, even for nearly equal models."""
    definition = registry.get(name, beta=0.3)
    student, teacher = random_logits(vocab=5000, dtype=torch.float32)
    nearly = student + 1e-4 * teacher
    for other in (teacher, nearly):
        row = row_of(student, other)
        assert (value_of(definition, row) >= 0).all()
        if name != "jsd":
            assert (definition.elements(torch, row)[0] >= -1e-7).all()


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_small_distances_survive_fp32(name: str) -> None:
    """A KL of 1e-7 is not drowned by the rounding of entropies near 8."""
    student, teacher = random_logits(rows=8, vocab=5000)
    teacher = student + 5e-4 * teacher
    definition = registry.get(name)
    exact = value_of(definition, row_of(student, teacher))
    assert exact.max() < 3e-6
    # The logits differ by what fp32 can hold of them, hence the inputs are rounded first.
    student, teacher = student.float(), teacher.float()
    exact = value_of(definition, row_of(student.double(), teacher.double()))
    found = value_of(definition, row_of(student, teacher))
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_equal_models_are_at_distance_zero_exactly(name: str, dtype: torch.dtype) -> None:
    student, _ = random_logits(dtype=dtype)
    definition = registry.get(name)
    row = row_of(student, student)
    assert not value_of(definition, row).any()
    assert not definition.gradient(torch, row, sums_of(definition, row)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_extreme_and_masked_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 1.0, -math.inf]], dtype=dtype)
    definition = registry.get(name)
    for teacher in rows:
        row = row_of(rows[:2], teacher.expand(2, 3))
        assert value_of(definition, row).isfinite().all()
        assert definition.gradient(torch, row, sums_of(definition, row)).isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_symmetric_in_its_arguments_and_shares(beta: float) -> None:
    student, teacher = random_logits()
    there = value_of(registry.get("jsd", beta=beta), row_of(student, teacher))
    back = value_of(registry.get("jsd", beta=1 - beta), row_of(teacher, student))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'fkl'; known: forward_kl, soft_ce"):
        registry.get("fkl")
