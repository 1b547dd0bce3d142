"""Label smoothing is torch's, the z-loss is the squared log-normaliser; value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from tests.loss_cases import check, config_of, run
from tests.oracle import Problem, gradients, make_problem, relative_error

HARD_ONLY = {"soft_weight": 0, "hard_weight": 1}


def logits_of(problem: Problem) -> Tensor:
    return problem.hidden @ problem.weight.T + (0 if problem.bias is None else problem.bias)


def same(problem: Problem, out: kd.DistillOutput, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert out.loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    for pair in zip(gradients(out.loss, problem.leaves, 0.37), gradients(wanted, problem.leaves, 0.37), strict=True):
        assert relative_error(*pair) < tolerance


@pytest.mark.parametrize(
    ("smoothing", "row_kernel"), [(0.01, "eager"), (0.1, "eager"), (0.9, "eager"), (0.1, "compile")]
)
def test_label_smoothing_is_torchs(smoothing: float, row_kernel: str) -> None:
    problem = make_problem(bias=True)
    wanted = F.cross_entropy(logits_of(problem), problem.targets, label_smoothing=smoothing)
    for chunk_size in (1, 4, 64):
        config = config_of(**HARD_ONLY, label_smoothing=smoothing, chunk_size=chunk_size, row_kernel=row_kernel)
        same(problem, run(problem, config), wanted)
        dense = kd.distill_logits(logits_of(problem), None, problem.targets, config=config)
        same(problem, dense, wanted)


@pytest.mark.parametrize("weight", [1e-4, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_is_the_squared_log_normaliser(weight: float, smoothing: float) -> None:
    problem = make_problem(bias=True)
    logits, valid = logits_of(problem), problem.targets != -100
    wanted = F.cross_entropy(logits, problem.targets, label_smoothing=smoothing)
    wanted = wanted + weight * torch.logsumexp(logits[valid], -1).square().mean()
    for chunk_size in (1, 4, 64):
        config = config_of(**HARD_ONLY, label_smoothing=smoothing, z_loss_weight=weight, chunk_size=chunk_size)
        same(problem, run(problem, config), wanted)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "uld"])
def test_both_beside_a_soft_loss(divergence: str, temperature: float) -> None:
    """The temperature does not reach them; token weights and num_items do."""
    config = config_of(divergence, temperature=temperature, label_smoothing=0.1, z_loss_weight=0.02)
    problem = make_problem(bias=True)
    check(problem, config, tolerance=1e-12, token_weights=torch.linspace(0, 3, 13), num_items=5)
    hot = run(problem, config.model_copy(update={"temperature": 7.0}))
    assert hot.hard_loss.item() == pytest.approx(run(problem, config).hard_loss.item(), rel=1e-14)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(11, 14), (14, 11)])
@pytest.mark.parametrize("row_kernel", ["eager", "compile"])
def test_both_are_over_all_of_the_students_rows(row_kernel: str, vocab: int, teacher_vocab: int) -> None:
    """Whatever rows the teacher has, and whether there is one."""
    problem = make_problem(vocab=vocab, teacher_vocab=teacher_vocab, bias=True)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.02, "row_kernel": row_kernel}
    config = config_of(**options)
    check(problem, config, tolerance=1e-12)
    logits, valid = logits_of(problem), problem.targets != -100
    wanted = F.cross_entropy(logits, problem.targets, label_smoothing=0.1)
    wanted = wanted + 0.02 * torch.logsumexp(logits[valid], -1).square().mean()
    assert run(problem, config).hard_loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    check(problem, config_of(**HARD_ONLY, **options), tolerance=1e-12)


def test_gradients_in_half_precision_and_through_a_large_normaliser() -> None:
    problem = make_problem(rows=61, width=33, teacher_width=33, vocab=203, dtype=torch.bfloat16)
    with torch.no_grad():
        problem.hidden *= 10
    config = config_of(label_smoothing=0.1, z_loss_weight=0.01)
    wide = problem.exact()
    out, expected = run(problem, config), wide.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, wide.leaves), strict=True):
        assert relative_error(*pair) < 5e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"label_smoothing": -0.1}, "greater than or equal to 0"),
        ({"z_loss_weight": -1}, "greater than or equal to 0"),
        ({"z_loss_weight": float("inf")}, "finite"),
        ({"hard_weight": 0, "label_smoothing": 0.1}, "parts of the hard loss: set hard_weight > 0"),
        ({"hard_weight": 0, "z_loss_weight": 0.1}, "parts of the hard loss: set hard_weight > 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd.DistillConfig(**settings)
