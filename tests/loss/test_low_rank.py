"""The low-rank term of the loss, as an adapter on the head adds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.loss.output import normalised
from tests import oracle
from tests.loss_cases import config_of, sums_of
from tests.oracle import Problem, gradients, make_problem, relative_error


def low_rank_loss(problem: Problem, term: LowRank, config: kd.DistillConfig) -> Tensor:
    return normalised(sums_of(problem, config, low_rank=term), None).loss


def dense_loss(problem: Problem, down: Tensor, up: Tensor, config: kd.DistillConfig) -> Tensor:
    logits = problem.hidden @ (problem.weight + up @ down).T
    logits = logits if problem.bias is None else logits + problem.bias
    teacher = problem.teacher_hidden @ problem.teacher_weight.T
    return oracle.distill_logits(logits, teacher, problem.targets, config).loss


def factors(rank: int, vocab: int = 11, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = ((rank, width), (vocab, rank))
    down, up = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return down.requires_grad_(), up.requires_grad_()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "logit_mse", "uld"])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 50])
@pytest.mark.parametrize(("rank", "teacher_vocab", "bias"), [(1, 11, False), (3, 9, True), (7, 13, False)])
def test_a_low_rank_term_has_the_oracles_loss_and_gradients(
    divergence: str, chunk_size: int, rank: int, teacher_vocab: int, bias: bool
) -> None:
    problem = make_problem(teacher_vocab=teacher_vocab, bias=bias)
    problem.teacher_bias = None
    down, up = factors(rank)
    config = config_of(divergence, temperature=2.0, chunk_size=chunk_size)
    found = low_rank_loss(problem, LowRank(problem.hidden @ down.T, up), config)
    wanted = dense_loss(problem, down, up, config)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    leaves = [*problem.leaves, down, up]
    for pair in zip(gradients(found, leaves, 0.3), gradients(wanted, leaves, 0.3), strict=True):
        assert relative_error(*pair) < 1e-12


@pytest.mark.parametrize("trained", ["hidden", "weight", "down", "up"])
def test_only_the_wanted_gradient_is_computed(trained: str) -> None:
    problem = make_problem()
    down, up = factors(2)
    leaves = {"hidden": problem.hidden, "weight": problem.weight, "down": down, "up": up}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    found = low_rank_loss(problem, LowRank(problem.hidden @ down.T, up), config_of())
    wanted = dense_loss(problem, down, up, config_of())
    pair = (torch.autograd.grad(loss, leaves[trained])[0] for loss in (found, wanted))
    assert relative_error(*pair) < 1e-12


def test_an_adapter_in_fp32_beside_a_bf16_head_is_multiplied_in_fp32() -> None:
    problem = make_problem(rows=40, width=16, vocab=50, dtype=torch.bfloat16, ignored=())
    down, up = (t.detach().float().requires_grad_() for t in factors(4, 50, 16))
    exact = problem.exact()
    exact_down, exact_up = (t.detach().double().requires_grad_() for t in (down, up))
    term = LowRank(problem.hidden.float() @ down.T, up)
    exact.teacher_hidden, exact.teacher_weight = exact.teacher_hidden.double(), exact.teacher_weight.double()
    wanted = dense_loss(exact, exact_down, exact_up, config_of())
    found = low_rank_loss(problem, term, config_of())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    pairs = zip(gradients(found, [down, up]), gradients(wanted, [exact_down, exact_up]), strict=True)
    assert all(relative_error(*pair) < 1e-5 for pair in pairs)
