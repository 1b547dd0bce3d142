"""The loss against the oracle: short forms that many tests share."""

from __future__ import annotations

import pytest

import kd_plugin as kd
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
