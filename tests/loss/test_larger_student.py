"""A student with more token ids than its teacher: what each number is over, on every path of one process.

The expected values are written out here with PyTorch's own dense functions in fp64, or are the oracle's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss import chunk_loop
from kd_plugin.row_kernels.row_pass import LogitTransform
from tests.loss_cases import check, config_of, run, sums_of
from tests.oracle import ALL_DIVERGENCES, Problem, gradients, make_problem, relative_error

V, SHARED = 29, 23  # rows of the student's head, and of the teacher's
BY_ID = tuple(name for name in ALL_DIVERGENCES if name != "uld")
EVERYTHING = {"temperature": 2.0, "label_smoothing": 0.1, "z_loss_weight": 0.02}


def problem_of(rows: int = 19, **options: object) -> Problem:
    """Some labels are ids that the teacher lacks."""
    problem = make_problem(rows=rows, vocab=V, teacher_vocab=SHARED, bias=True, **options)
    problem.targets[3], problem.targets[7] = SHARED, V - 1
    return problem


class Dense(NamedTuple):
    """Whole logits of the rows that count, fp64; the student's with a graph."""

    student: Tensor  # [n, V]
    teacher: Tensor  # [n, SHARED]
    targets: Tensor  # [n]


def dense(problem: Problem) -> Dense:
    valid = problem.targets != -100
    student = problem.hidden @ problem.weight.T + problem.bias
    teacher = problem.teacher_hidden @ problem.teacher_weight.T + problem.teacher_bias
    return Dense(student[valid], teacher[valid], problem.targets[valid])


def test_the_definition() -> None:
    problem = problem_of()
    student, teacher, targets = dense(problem)
    out = run(problem, config_of(temperature=2.0))
    hard = F.cross_entropy(student, targets)
    soft = 4 * F.kl_div(F.log_softmax(student[:, :SHARED] / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
    assert out.hard_loss.item() == pytest.approx(hard.item(), rel=1e-13)
    assert out.soft_loss.item() == pytest.approx(soft.item(), rel=1e-13)
    q, p = student.softmax(-1), F.pad(teacher.softmax(-1), (0, V - SHARED))
    some = p > 0
    expected = {
        "kl_t1": torch.where(some, p * (p.log() - q.log()), 0.0).sum(-1),
        "acceptance_rate": torch.minimum(p, q).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -torch.where(some, p * p.log(), 0.0).sum(-1),
    }
    assert out.metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert out.metrics[name].item() == pytest.approx(values.mean().item(), rel=1e-12), name


def test_the_rows_that_the_teacher_lacks_learn_from_the_hard_loss_alone() -> None:
    problem = problem_of()
    student, _, targets = dense(problem)
    leaves = [problem.weight, problem.bias]
    wanted = gradients(0.4 * F.cross_entropy(student, targets), leaves)
    for found, expected in zip(gradients(run(problem, config_of()).loss, leaves), wanted, strict=True):
        assert relative_error(found[SHARED:], expected[SHARED:]) < 1e-12
        assert relative_error(found[:SHARED], expected[:SHARED]) > 0.1  # these have the soft loss, too
    for grad in gradients(run(problem, config_of(hard_weight=0)).loss, leaves):
        assert not grad[SHARED:].any() and grad[:SHARED].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
def test_every_divergence_in_chunks(divergence: str, temperature: float) -> None:
    problem = problem_of()
    settings = {**EVERYTHING, "temperature": temperature}
    for chunk_size in (1, 4, 64):
        check(problem, config_of(divergence, chunk_size=chunk_size, **settings), tolerance=1e-12, scale=0.37)


PARTS = {
    "soft only": {"hard_weight": 0.0},
    "soft only, no metrics": {"hard_weight": 0.0, "metrics": False},
    "no metrics": {"metrics": False},
    "hard only": {"soft_weight": 0.0},
    "terms": {"terms": [{"name": "forward_kl", "temperature": 3.0}, {"name": "reverse_kl"}, {"name": "cosine"}]},
    "uld": {"divergence": "uld", "label_smoothing": 0.1},
}


KERNELS = [(name, "eager") for name in PARTS] + [("soft only", "compile"), ("no metrics", "compile")]


@pytest.mark.parametrize(("part", "kernel"), KERNELS)
def test_parts_of_the_objective(part: str, kernel: str) -> None:
    config = kd.DistillConfig(
        **{"soft_weight": 0.7, "hard_weight": 0.4, "row_kernel": kernel, "chunk_size": 4, **PARTS[part]}
    )
    weights = torch.linspace(0, 3, 19)
    check(problem_of(), config, tolerance=1e-11, token_weights=weights)
    reference = kd.reference.distill_loss(*problem_of(), config=config, token_weights=weights, **problem_of().biases)
    out = run(problem_of(), config, token_weights=weights)
    for name, value in (*out._asdict().items(), *out.metrics.items()):
        if isinstance(value, Tensor):
            wanted = reference.metrics[name] if name in reference.metrics else getattr(reference, name)
            assert value.item() == pytest.approx(wanted.item(), rel=1e-11, abs=1e-12), name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_compiled_kernel() -> None:
    """All divergences in one graph."""
    terms = [{"name": name, "weight": 0.3 + 0.1 * i, "temperature": 1 + i % 2} for i, name in enumerate(BY_ID)]
    config = kd.DistillConfig(terms=terms, label_smoothing=0.1, z_loss_weight=0.02, row_kernel="compile", chunk_size=4)
    for problem in (problem_of(), problem_of(seed=1)):
        check(problem, config, tolerance=1e-11, scale=0.37)


def test_scale_and_softcap_of_either_model() -> None:
    problem, transforms = problem_of(), (LogitTransform(0.5, 4.0), LogitTransform(2.0, 6.0))
    config = config_of("jsd", **EVERYTHING)
    sums = sums_of(problem, config, transforms=transforms)
    raw = dense(problem)
    capped = [cap * torch.tanh(scale * z / cap) for z, (scale, cap) in zip(raw[:2], transforms, strict=True)]
    wanted = kd.reference.distill_logits(*capped, raw.targets, config=config).loss
    loss = sums.loss_sum / sums.num_valid
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for pair in zip(gradients(loss, problem.leaves), gradients(wanted, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11


def test_fp32() -> None:
    problem = make_problem(37, 19, 23, 101, 83, dtype=torch.float32, bias=True)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        check(problem, config_of(divergence, chunk_size=7, **EVERYTHING), tolerance=1e-5, scale=0.37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_less_than_eager_in_the_same_precision(dtype: torch.dtype) -> None:
    problem = make_problem(61, 33, 33, 203, 150, dtype=dtype)
    config = config_of("forward_kl", chunk_size=16, temperature=2.0)
    expected = problem.expected(config)
    out = run(problem, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = [F.linear(*pair).float() for pair in (tuple(problem)[:2], tuple(problem)[2:4])]
    naive = kd.reference.distill_logits(*logits, problem.targets, config=config).loss
    wanted = gradients(expected.loss, problem.leaves)
    for ours, theirs, truth in zip(
        gradients(out.loss, problem.leaves), gradients(naive, problem.leaves), wanted, strict=True
    ):
        assert relative_error(ours, truth) <= relative_error(theirs, truth)


@pytest.mark.parametrize("shift", [-60.0, -9.0, 0.0, 9.0, 60.0])
def test_whichever_rows_hold_the_mass(shift: float) -> None:
    """Almost none of it, or almost all, on ids that the teacher lacks; the student is its teacher elsewhere."""
    generator = torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(5, SHARED, generator=generator, dtype=torch.float64)
    rest = torch.randn(5, V - SHARED, generator=generator, dtype=torch.float64) + shift
    student = torch.cat([teacher, rest], 1).requires_grad_()
    targets = torch.tensor([0, V - 1, SHARED, 3, SHARED - 1])
    config = config_of("forward_kl", temperature=2.0)
    rest_mass = (rest.logsumexp(-1) - student.logsumexp(-1)).exp()
    kl = -(1 - rest_mass).log() if shift < 9 else student.logsumexp(-1) - teacher.logsumexp(-1)
    (wanted,) = torch.autograd.grad(0.4 * F.cross_entropy(student, targets), student)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        leaf = student.detach().to(dtype).requires_grad_()
        out = kd.distill_logits(leaf, teacher.to(dtype), targets, config=config)
        assert out.soft_loss.item() == pytest.approx(0, abs=tolerance)
        hard = F.cross_entropy(student, targets).item()
        assert out.hard_loss.item() == pytest.approx(hard, rel=tolerance, abs=tolerance)
        assert out.metrics["kl_t1"].item() == pytest.approx(kl.mean().item(), rel=tolerance, abs=tolerance / 10)
        agree = (student.argmax(-1) < SHARED).double().mean().item()
        assert out.metrics["top1_agreement"].item() == agree
        (found,) = torch.autograd.grad(out.loss, leaf)
        assert relative_error(found, wanted) < 5 * tolerance


def test_masked_rows_of_the_student_alone_count_for_nothing() -> None:
    """As where a model adds -inf to the logits of its padding."""
    student, teacher = (2 * torch.randn(6, n, dtype=torch.float64) for n in (V, SHARED))
    student[:, SHARED:] = -math.inf
    targets = torch.arange(6)
    outs, grads = [], []
    for columns in (V, SHARED):
        leaf = student[:, :columns].clone().requires_grad_()
        outs.append(kd.distill_logits(leaf, teacher, targets, config=config_of("reverse_kl")))
        grads.append(torch.autograd.grad(outs[-1].loss, leaf)[0])
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-13)
    for name, value in outs[0].metrics.items():
        assert value.item() == pytest.approx(outs[1].metrics[name].item(), rel=1e-12, abs=1e-15), name
    torch.testing.assert_close(grads[0][:, :SHARED], grads[1], rtol=1e-12, atol=1e-15)
    assert not grads[0][:, SHARED:].any()


LOGITS = {
    "fused": kd.distill_logits,
    "reference": kd.reference.distill_logits,
    "both models trained": lambda *tensors, **options: kd.distill_logits(*tensors, detach_teacher=False, **options),
}


@pytest.mark.parametrize("way", LOGITS)
@pytest.mark.parametrize("divergence", ["forward_kl", "acceptance", "uld"])
def test_logits(divergence: str, way: str) -> None:
    problem = problem_of()
    with torch.no_grad():
        student, teacher, _ = dense(replace(problem, targets=torch.zeros(19, dtype=torch.int64)))
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    config = config_of(divergence, chunk_size=4, **EVERYTHING)
    out, expected = LOGITS[way](student, teacher, problem.targets, config=config), problem.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for name, value in expected.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-12), name
    (found,) = torch.autograd.grad(out.loss, student, retain_graph=True)
    for grad, wanted in zip(
        (found.T @ problem.hidden.detach(), found @ problem.weight.detach()),
        gradients(expected.loss, [problem.weight, problem.hidden]),
        strict=True,
    ):
        assert relative_error(grad, wanted) < 1e-11
    if way == "both models trained":
        (of_teacher,) = torch.autograd.grad(out.loss, teacher)
        assert of_teacher.isfinite().all() and of_teacher.any()


def test_losses_per_token() -> None:
    problem = problem_of()
    config, factors = config_of("jsd", **EVERYTHING), torch.linspace(-2, 3, 19).double()
    losses = kd.distill_loss_per_token(*problem, config=config, **problem.biases)
    expected = problem.expected(config, token_weights=factors, num_items=1)
    assert (losses.loss * factors).sum().item() == pytest.approx(expected.loss.item(), rel=1e-12)
    found = gradients((losses.loss * factors).sum(), problem.leaves)
    for pair in zip(found, gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_a_registered_divergence_sees_the_shared_ids() -> None:
    kd.register_divergence("squares", lambda log_q, log_p: (log_q.exp() - log_p.exp()) ** 2 + 0 * log_q)
    problem = problem_of()
    student, teacher, _ = dense(problem)
    q, p = student[:, :SHARED].softmax(-1), teacher.softmax(-1)
    wanted = (q - p).square().sum(-1).mean()
    out = run(problem, config_of("squares", hard_weight=0.0, soft_weight=1.0))
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(wanted, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11


def boom(error: Exception) -> Callable[..., Tensor]:
    def gather(*args: object, **kwargs: object) -> Tensor:
        raise error

    return gather


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: unknown")])
def test_no_other_error_is_told_as_labels_out_of_the_vocabulary(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "gather", boom(error))
    with pytest.raises(type(error), match=str(error)):
        chunk_loop._of_labels(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64))
