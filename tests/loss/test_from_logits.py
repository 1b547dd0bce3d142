"""distill_logits against the fp64 oracle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from tests import oracle
from tests.loss_cases import config_of
from tests.oracle import DIVERGENCES, chunk_sizes, gradients, make_problem, relative_error


def logits_of(**options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, targets)."""
    problem = make_problem(**options)
    student = (problem.hidden @ problem.weight.T).detach().requires_grad_()
    return student, problem.teacher_hidden @ problem.teacher_weight.T, problem.targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(11, 11), (11, 14), (14, 11)])
def test_values_and_gradients(divergence: str, temperature: float, vocab: int, teacher_vocab: int) -> None:
    student, teacher, targets = logits_of(vocab=vocab, teacher_vocab=teacher_vocab)
    for chunk_size in chunk_sizes(rows=9):
        config = config_of(divergence, temperature=temperature, chunk_size=chunk_size)
        out = kd.distill_logits(student, teacher, targets, config=config)
        expected = oracle.distill_logits(student, teacher, targets, config)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        assert out.soft_loss.item() == pytest.approx(expected.soft, rel=1e-12)
        assert out.hard_loss.item() == pytest.approx(expected.hard, rel=1e-12)
        assert out.num_valid.item() == expected.num_valid == 9
        for name, value in expected.metrics.items():
            assert out.metrics[name].item() == pytest.approx(value, rel=1e-12, abs=1e-12)
        found, wanted = gradients(out.loss, [student], 0.37), gradients(expected.loss, [student], 0.37)
        assert relative_error(found[0], wanted[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_come_back_in_the_logits_own_precision(dtype: torch.dtype) -> None:
    student, teacher, targets = logits_of(rows=31, vocab=101, dtype=torch.float32)
    student = student.detach().to(dtype).requires_grad_()
    config = config_of("jsd", temperature=2.0)
    out = kd.distill_logits(student, teacher.to(dtype), targets, config=config)
    expected = oracle.distill_logits(student, teacher.to(dtype), targets, config)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    (found,), (wanted,) = gradients(out.loss, [student]), gradients(expected.loss, [student])
    assert found.dtype == dtype
    # the kept gradient is rounded once, the scaled one again
    assert relative_error(found, wanted) < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_leading_dimensions_are_free() -> None:
    student, teacher, targets = logits_of(rows=12, ignored=(1, 5))
    flat = kd.distill_logits(student, teacher, targets, config=config_of())
    cube = kd.distill_logits(student.view(3, 4, 11), teacher.view(3, 4, 11), targets.view(3, 4), config=config_of())
    assert cube.loss.item() == flat.loss.item()
    assert torch.equal(*(gradients(out.loss, [student])[0] for out in (cube, flat)))


def test_ignored_rows_may_hold_anything() -> None:
    student, teacher, targets = logits_of()
    wanted = kd.distill_logits(student, teacher, targets, config=config_of())
    poisoned = student.detach().clone()
    poisoned[[1, 5, 6]] = float("nan")
    poisoned.requires_grad_()
    teacher[[5, 12]] = float("inf")
    out = kd.distill_logits(poisoned, teacher, targets, config=config_of())
    assert out.loss.item() == wanted.loss.item()
    assert torch.equal(gradients(out.loss, [poisoned])[0], gradients(wanted.loss, [student])[0])


@pytest.mark.parametrize("row_kernel", ["eager", "compile"])
def test_no_valid_row_gives_zero_with_a_graph(row_kernel: str) -> None:
    student, teacher, targets = logits_of(ignored=tuple(range(13)))
    out = kd.distill_logits(student, teacher, targets, config=config_of(row_kernel=row_kernel))
    out.loss.backward()
    assert out.loss.item() == 0 and not student.grad.any()


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_num_items_divides_value_and_gradient(num_items: int | Tensor) -> None:
    student, teacher, targets = logits_of()
    out = kd.distill_logits(student, teacher, targets, config=config_of(), num_items=num_items)
    expected = oracle.distill_logits(student, teacher, targets, config_of(), num_items=7)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert relative_error(gradients(out.loss, [student])[0], gradients(expected.loss, [student])[0]) < 1e-12


def test_backward_twice_gives_the_same_gradients() -> None:
    student, teacher, targets = logits_of()
    out = kd.distill_logits(student, teacher, targets, config=config_of())
    first = torch.autograd.grad(out.loss, student, retain_graph=True)[0].clone()
    second = torch.autograd.grad(out.loss, student)[0]
    assert torch.equal(first, second)


def test_the_teacher_gets_a_gradient_only_when_asked() -> None:
    student, teacher, targets = logits_of()
    teacher.requires_grad_()
    config = config_of("reverse_kl", temperature=2.0)
    detached = kd.distill_logits(student, teacher, targets, config=config)
    detached.loss.backward()
    assert teacher.grad is None

    joint = kd.distill_logits(student, teacher, targets, config=config, detach_teacher=False)
    assert joint.loss.item() == pytest.approx(detached.loss.item(), rel=1e-12)
    grads = torch.autograd.grad(joint.loss, [student, teacher])
    assert relative_error(grads[0], student.grad) < 1e-12

    def loss(logits: Tensor) -> Tensor:
        return kd.distill_logits(student, logits, targets, config=config, detach_teacher=False).loss

    assert torch.autograd.gradcheck(loss, (teacher,))
    assert grads[1].abs().sum() > 0


def test_without_soft_loss_there_need_be_no_teacher() -> None:
    student, _, targets = logits_of()
    config = config_of(soft_weight=0, hard_weight=1)
    out = kd.distill_logits(student, None, targets, config=config)
    wanted = torch.nn.functional.cross_entropy(student, targets)
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-14)
    assert relative_error(gradients(out.loss, [student])[0], gradients(wanted, [student])[0]) < 1e-12


@pytest.mark.parametrize("name", ["logit_mse", "logit_mse_centered", "cosine"])
def test_the_reference_leaves_masked_tokens_out_of_distances(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    student[:, 3], teacher[1, 5:] = -math.inf, -math.inf
    config = kd.DistillConfig(divergence=name, soft_weight=1.0, hard_weight=0.0, metrics=False)
    losses, grads = [], []
    for function in (kd.distill_logits, kd.reference.distill_logits):
        leaf = student.clone().requires_grad_(True)
        loss = function(leaf, teacher, config=config).loss
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and math.isfinite(losses[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "function", [kd.reference.distill_logits, functools.partial(kd.distill_logits, detach_teacher=False)]
)
def test_a_target_outside_the_vocabulary_is_refused_on_dense_logits_too(function: Callable[..., Any]) -> None:
    targets = torch.tensor([0, 9, -100])
    with pytest.raises(ValueError, match="target 9 lies outside the vocabulary of 9 tokens"):
        function(torch.zeros(3, 9), torch.zeros(3, 9), targets, config=kd.DistillConfig())
