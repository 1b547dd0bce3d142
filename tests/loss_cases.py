"""The loss against the oracle: short forms that many tests share."""

from __future__ import annotations

import pytest

import kd_plugin as kd
from kd_plugin.loss import from_hidden
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.loss.output import LossSums
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.row_kernels.row_pass import IDENTITY, LogitTransform
from tests.oracle import Problem, gradients, relative_error


def config_of(divergence: str = "forward_kl", **settings: object) -> kd.DistillConfig:
    defaults = {"beta": 0.3, "soft_weight": 0.7, "hard_weight": 0.4, "chunk_size": 4, "row_kernel": "eager"}
    return kd.DistillConfig(divergence=divergence, **{**defaults, **settings})


def run(problem: Problem, config: kd.DistillConfig, **options: object) -> kd.DistillOutput:
    return kd.distill_loss(*problem, config=config, **problem.biases, **options)


def check(problem: Problem, config: kd.DistillConfig, tolerance: float, scale: float = 1.0, **options: object) -> None:
    """Value, parts, metrics and all gradients equal the oracle's."""
    out, expected = run(problem, config, **options), problem.expected(config, **options)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance, abs=tolerance)
    assert out.soft_loss.item() == pytest.approx(expected.soft, rel=tolerance, abs=tolerance)
    assert out.hard_loss.item() == pytest.approx(expected.hard, rel=tolerance, abs=tolerance)
    assert out.num_valid.item() == expected.num_valid
    for name, value in expected.metrics.items() if config.metrics else ():
        assert out.metrics[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance), name
    found = gradients(out.loss, problem.leaves, scale)
    for grad, wanted in zip(found, gradients(expected.loss, problem.leaves, scale), strict=True):
        assert relative_error(grad, wanted) <= tolerance


def sums_of(
    problem: Problem,
    config: kd.DistillConfig,
    *,
    transforms: tuple[LogitTransform, LogitTransform] = (IDENTITY, IDENTITY),
    low_rank: LowRank | None = None,
) -> LossSums:
    """What the head asks the loss for: sums, and what is known of the call. No teacher where there is no soft loss."""
    teacher = HeadTeacher(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias, transforms[1])
    call = HeadCall(teacher if config.soft_weight else None, problem.targets)
    size = problem.weight.shape[0]
    given = from_hidden.make_problem(call, config, problem.hidden, size, transform=transforms[0])
    return from_hidden.loss_sums(given, problem.hidden, problem.weight, problem.bias, low_rank)
