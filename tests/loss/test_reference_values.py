"""The published values: every path gives them, in value and gradient, whatever the chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kd_plugin as kd
from tests import oracle
from tests.reference_values import (
    GRADIENT_NORMS,
    HINTON_LIMIT,
    LOSSES,
    MEAN_OF_MICRO_BATCH_MEANS,
    METRICS,
    PADDED_T,
    RAGGED_ACCUMULATION,
    RAGGED_Y,
    ROCKETQA_KL,
    ROCKETQA_TOTAL,
    SKEW_CE,
    TOLERANCE,
    S,
    T,
    Y,
    logits_problem,
)

CHUNK_SIZES = (1, 3, 8, 64)
PATHS = {
    "distill_loss": lambda config: _through_weights(kd.distill_loss, config),
    "reference.distill_loss": lambda config: _through_weights(kd.reference.distill_loss, config),
    "distill_logits": lambda config: _through_logits(kd.distill_logits, config),
    "reference.distill_logits": lambda config: _through_logits(kd.reference.distill_logits, config),
}


# Divergences of rows cut to the shared vocabulary.
PADDING_INVARIANT = ("forward_kl", "reverse_kl", "soft_ce", "jsd_0.5", "skew_kl_0.1", "tvd", "acceptance", "logit_mse")


def _config(name: str, **settings: object) -> kd.DistillConfig:
    return kd.DistillConfig(**{"row_kernel": "eager", **LOSSES[name][0], **settings})


def _through_weights(loss, config):
    arguments = logits_problem()
    out = loss(*arguments, config=config)
    return out, *torch.autograd.grad(out.loss, arguments[:2])


def _through_logits(loss, config):
    student = S.clone().requires_grad_()
    out = loss(student, T, Y, config=config)
    return out, *torch.autograd.grad(out.loss, [student])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str, path: str, chunk_size: int) -> None:
    config = _config(name, chunk_size=chunk_size)
    out, grad_hidden, *grad_weight = PATHS[path](config)
    # 1e6 times a difference of nearly equal numbers: fp64 keeps ten digits of it
    tolerance = 1e-8 if config.temperature > 100 else 1e-12

    student, weight = S.clone().requires_grad_(), torch.eye(4, dtype=torch.float64, requires_grad=True)
    expected = oracle.distill_logits(student @ weight.T, T, Y, config)
    wanted = torch.autograd.grad(expected.loss, [student, weight])

    assert out.loss.item() == pytest.approx(LOSSES[name][1], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=tolerance)
    torch.testing.assert_close(grad_hidden, wanted[0], rtol=0, atol=tolerance)
    if grad_weight:
        torch.testing.assert_close(grad_weight[0], wanted[1], rtol=0, atol=tolerance)
    if name in GRADIENT_NORMS:
        assert float(grad_hidden.norm()) == pytest.approx(GRADIENT_NORMS[name], abs=TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_metrics(path: str) -> None:
    out, *_ = PATHS[path](_config("forward_kl_T2", chunk_size=3))
    for name, value in METRICS.items():
        assert float(out.metrics[name]) == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("name", [*PADDING_INVARIANT, "half_ce_plus_half_jsd", "half_ce_plus_half_forward_kl_T2"])
def test_a_padded_vocabulary_changes_no_soft_loss_and_the_students_own_cross_entropy_alone(
    name: str, chunk_size: int
) -> None:
    config = _config(name, chunk_size=chunk_size)
    identity, padded = torch.eye(4, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    padded_student = torch.cat([S, torch.randn(8, 2, dtype=torch.float64)], dim=1)
    more = F.cross_entropy(padded_student, Y) - F.cross_entropy(S, Y)
    wanted = LOSSES[name][1] + config.hard_weight * float(more)
    for loss in (kd.distill_loss, kd.reference.distill_loss):
        wide_teacher = loss(S, identity, PADDED_T, padded, Y, config=config)
        wide_student = loss(padded_student, padded, T, identity, Y, config=config)
        assert wide_teacher.loss.item() == pytest.approx(LOSSES[name][1], abs=TOLERANCE)
        assert wide_student.loss.item() == pytest.approx(wanted, abs=TOLERANCE)
    for loss in (kd.distill_logits, kd.reference.distill_logits):
        assert float(loss(S, PADDED_T, Y, config=config).loss) == pytest.approx(LOSSES[name][1], abs=TOLERANCE)
        assert float(loss(padded_student, T, Y, config=config).loss) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("path", ["distill_logits", "reference.distill_logits"])
def test_uld_counts_the_padding_of_the_larger_vocabulary(path: str) -> None:
    """Padding of probability zero changes nothing; the ids being free, the student's padding is real."""
    loss = kd.distill_logits if path == "distill_logits" else kd.reference.distill_logits
    config = _config("uld")
    assert float(loss(S, PADDED_T, Y, config=config).loss) == pytest.approx(LOSSES["uld"][1], abs=TOLERANCE)
    assert float(loss(PADDED_T, S, Y, config=config).loss) == pytest.approx(LOSSES["uld"][1], abs=TOLERANCE)
    padded_student = torch.cat([S, torch.zeros(8, 2, dtype=torch.float64)], dim=1)
    assert float(loss(padded_student, T, Y, config=config).loss) > 1.1 * LOSSES["uld"][1]


def test_skewed_cross_entropy_is_skew_kl_and_the_teachers_entropy() -> None:
    value = LOSSES["skew_kl_0.1"][1] + METRICS["teacher_entropy"]
    out = kd.distill_logits(S, T, config=_config("skew_kl_0.1"))
    assert float(out.loss + out.metrics["teacher_entropy"]) == pytest.approx(SKEW_CE, abs=TOLERANCE)
    assert value == pytest.approx(SKEW_CE, abs=TOLERANCE)


def test_a_ranker_and_its_teacher_are_trained_together() -> None:
    """KL with gradients into both, as the mean over rows and places, plus the teacher's own cross-entropy."""
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    relevant = torch.zeros(8, dtype=torch.int64)
    listwise = kd.distill_logits(student, teacher, config=_config("forward_kl"), detach_teacher=False, num_items=8 * 4)
    own = kd.distill_logits(teacher, None, relevant, config=_config("hard_ce"))
    assert listwise.loss.item() == pytest.approx(ROCKETQA_KL, abs=TOLERANCE)
    assert (listwise.loss + own.loss).item() == pytest.approx(ROCKETQA_TOTAL, abs=TOLERANCE)

    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    written_out = (log_p.exp() * (log_p - log_q)).mean() - log_p[:, 0].mean()
    wanted = torch.autograd.grad(written_out, [student, teacher])
    found = torch.autograd.grad(listwise.loss + own.loss, [student, teacher])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["half_ce_plus_half_jsd", "forward_kl"])
def test_rows_that_only_the_student_has_get_the_gradient_of_the_hard_loss_alone(name: str) -> None:
    config = _config(name)
    padded = torch.eye(6, dtype=torch.float64, requires_grad=True)
    hidden = torch.cat([S, torch.ones(8, 2, dtype=torch.float64)], dim=1).requires_grad_()
    kd.distill_loss(hidden, padded, T, torch.eye(4).double(), Y, config=config).loss.backward()
    own = padded.detach().requires_grad_()
    hard = config.hard_weight * F.cross_entropy(hidden.detach() @ own.T, Y)
    (wanted,) = torch.autograd.grad(hard, own)
    torch.testing.assert_close(padded.grad[4:], wanted[4:], rtol=0, atol=1e-12)
    assert bool(padded.grad[4:].any()) == bool(config.hard_weight)


@pytest.mark.parametrize("path", ["distill_loss", "distill_logits"])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_ragged_accumulation_is_the_mean_over_all_tokens(path: str, chunk_size: int) -> None:
    config = _config("forward_kl", chunk_size=chunk_size)
    identity = torch.eye(4, dtype=torch.float64)

    def micro_batch(rows: slice, num_items: int | None) -> kd.DistillOutput:
        if path == "distill_logits":
            return kd.distill_logits(S[rows], T[rows], RAGGED_Y[rows], config=config, num_items=num_items)
        return kd.distill_loss(S[rows], identity, T[rows], identity, RAGGED_Y[rows], config=config, num_items=num_items)

    halves = (slice(0, 4), slice(4, 8))
    assert sum(float(micro_batch(rows, 4).loss) for rows in halves) == pytest.approx(RAGGED_ACCUMULATION, abs=TOLERANCE)
    local_means = [float(micro_batch(rows, None).loss) for rows in halves]
    assert sum(local_means) / 2 == pytest.approx(MEAN_OF_MICRO_BATCH_MEANS, abs=TOLERANCE)


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    config = _config("half_ce_plus_half_forward_kl_T2", chunk_size=3)
    hidden, weight, teacher_hidden, teacher_weight, _ = logits_problem()
    whole = kd.distill_loss(hidden, weight, teacher_hidden, teacher_weight, RAGGED_Y, config=config)
    wanted = torch.autograd.grad(whole.loss, [hidden, weight])
    for rows in (slice(0, 4), slice(4, 8)):
        part = kd.distill_loss(
            hidden[rows], weight, T[rows], teacher_weight, RAGGED_Y[rows], config=config, num_items=4
        )
        part.loss.backward()
    torch.testing.assert_close([hidden.grad, weight.grad], list(wanted), rtol=0, atol=1e-15)


def test_high_temperature_tends_to_logit_matching() -> None:
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        config = kd.DistillConfig(temperature=temperature, soft_weight=1, hard_weight=0, row_kernel="eager")
        errors.append(abs(float(kd.distill_logits(S, T, config=config).loss) - HINTON_LIMIT))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
