"""A student of more token ids than its teacher, with its vocabulary in slices: all of them on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kd_plugin as kd
from kd_plugin.distributed.vocab_slice import cut
from kd_plugin.exchange import vocab_parallel
from kd_plugin.loss import from_hidden
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher
from tests.loss_cases import config_of
from tests.oracle import Problem, make_problem, relative_error

V, SHARED = 29, 23  # rows of the student's head, and of the teacher's


def problem_of(rows: int = 19, **options: object) -> Problem:
    """Some labels are ids that the teacher lacks."""
    problem = make_problem(rows=rows, vocab=V, teacher_vocab=SHARED, bias=True, **options)
    problem.targets[3], problem.targets[7] = SHARED, V - 1
    return problem


@pytest.fixture
def process_group() -> Iterator[None]:
    """One rank, which holds all columns."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_shards(problem: Problem, config: kd.DistillConfig, rows: Tensor | None = None) -> tuple[Tensor, int]:
    """Loss sum in exchange `stats`, and the bytes of its whole logits."""
    teacher = HeadTeacher(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
    teacher = teacher if config.soft_weight else None
    call = HeadCall(teacher, problem.targets, rows)
    given = from_hidden.make_problem(call, config, problem.hidden, V, teacher_size=SHARED)
    vocab_slice = cut(V, None if teacher is None else SHARED, None)
    tensors = (problem.hidden, problem.weight, problem.bias)
    loss_sum, _ = vocab_parallel.VocabParallelDistill.apply(*tensors, given, vocab_slice, 1.0)
    return loss_sum, given.dense_bytes


@pytest.mark.usefixtures("process_group")
def test_a_vocabulary_in_shards_counts_its_logits_as_a_whole_one_does() -> None:
    for dtype in (torch.float32, torch.float64):
        problem = problem_of(dtype=dtype, ignored=())
        assert in_shards(problem, config_of())[1] == 4 * 19 * (V + SHARED)
        assert in_shards(problem, config_of(soft_weight=0.0))[1] == 4 * 19 * V


@pytest.mark.usefixtures("process_group")
def test_an_fp32_bias_beside_a_bf16_head_gets_an_fp32_gradient() -> None:
    problem = problem_of(dtype=torch.bfloat16)
    problem.bias = problem.bias.detach().float().requires_grad_()
    config = config_of()
    loss, _ = in_shards(problem, config)
    (found,) = torch.autograd.grad(loss, problem.bias)
    (wanted,) = torch.autograd.grad(problem.expected(config, num_items=1).loss, problem.bias)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("label", [-100, V])
def test_in_shards_a_label_that_no_rank_has_is_refused(label: int) -> None:
    problem = problem_of(ignored=())
    problem.targets[2] = label
    with pytest.raises(ValueError, match=f"loss_rows point at labels outside the vocabulary of {V} .such as {label}"):
        in_shards(problem, config_of(), rows=torch.arange(5))
    loss, _ = in_shards(problem, config_of(), rows=torch.tensor([0, 1, 3, 7]))
    kept = torch.full((19,), -100).index_copy(0, idx := torch.tensor([0, 1, 3, 7]), problem.targets[idx])
    expected = replace(problem, targets=kept).expected(config_of(), num_items=1)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
