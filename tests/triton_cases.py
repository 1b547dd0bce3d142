"""The Triton kernel against the eager one; run by test_triton.py under TRITON_INTERPRET=1.

The eager kernel runs in fp64, so that errors are those of the Triton kernel's fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kd_plugin as kd
from kd_plugin.divergences.objective import make_objective
from kd_plugin.divergences.registry import DIVERGENCES
from kd_plugin.row_kernels import dispatch, triton_math
from kd_plugin.row_kernels.row_pass import IDENTITY, LogitTransform, RowSpec, row_pass
from kd_plugin.row_kernels.statistics import STATISTICS
from kd_plugin.settings.run import DistillConfig
from tests.oracle import gradients, make_problem, relative_error

BY_ID = tuple(name for name in DIVERGENCES if name != "uld")
INF = float("inf")


class Rows(NamedTuple):
    """Arguments of row_pass after the spec."""

    student: Tensor
    teacher: Tensor | None
    target: Tensor | None
    weight: Tensor | None = None
    hard_weight: Tensor | None = None


def make_rows(vocab: int, rows: int = 2, scale: float = 3.0, seed: int = 0, teacher_vocab: int | None = None) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocab, (rows, 1), generator=generator)
    return Rows(student, teacher[:, :teacher_vocab], student.gather(1, targets))


def check(spec: RowSpec, rows: Rows, tolerance: float = 1e-5) -> Tensor:
    """Same statistics, same gradient (of the largest entry, as most are near zero). -> the statistics."""
    expected = Rows(*(None if t is None else t.double() for t in rows))
    wanted = row_pass(spec, *expected)
    found = rows._replace(student=rows.student.clone())
    statistics = dispatch.run("triton", spec, rows.student.shape[0], *found)
    torch.testing.assert_close(statistics.double(), wanted, rtol=tolerance, atol=tolerance / 10)
    if spec.with_gradient:
        assert found.student.isfinite().all()
        scale = expected.student.abs().amax().item()
        torch.testing.assert_close(found.student.double(), expected.student, rtol=0, atol=tolerance * scale + 1e-9)
    else:
        assert torch.equal(found.student, rows.student)
    return statistics


def spec_of(*, with_gradient: bool = True, student: LogitTransform = IDENTITY, **settings: object) -> RowSpec:
    objective = make_objective(DistillConfig(**settings))
    return RowSpec(objective, student, LogitTransform(softcap=20.0), with_gradient)


@pytest.mark.parametrize(("vocab", "temperature"), [(1, 2.0), (7, 1.0), (130, 2.0), (1025, 1.0)])
@pytest.mark.parametrize("divergence", BY_ID)
def test_every_divergence(divergence: str, vocab: int, temperature: float) -> None:
    spec = RowSpec(make_objective(DistillConfig(divergence=divergence, temperature=temperature, beta=0.3)))
    check(spec, make_rows(vocab))


@pytest.mark.parametrize(("vocab", "teacher_vocab", "temperature"), [(130, 129, 2.0), (700, 300, 1.0)])
@pytest.mark.parametrize("divergence", BY_ID)
def test_every_divergence_of_a_student_with_more_columns(
    divergence: str, vocab: int, teacher_vocab: int, temperature: float
) -> None:
    """In parts of less than a block, and of several."""
    rows = make_rows(vocab, teacher_vocab=teacher_vocab)._replace(weight=torch.tensor([[1.0], [2.5]]))
    transform = LogitTransform(scale=0.5, softcap=5.0)
    settings = {"temperature": temperature, "beta": 0.3, "label_smoothing": 0.1, "z_loss_weight": 1e-2}
    check(spec_of(divergence=divergence, student=transform, **settings), rows)


def test_columns_that_the_teacher_lacks_in_parts_of_the_objective() -> None:
    rows = make_rows(130, teacher_vocab=70)
    for settings in ({"hard_weight": 0}, {"metrics": False}, {"hard_weight": 0, "metrics": False}):
        target = None if "hard_weight" in settings else rows.target
        check(spec_of(**settings), rows._replace(target=target))
    check(spec_of(with_gradient=False), rows)
    rows.student[0, 70:] = -INF  # masked, as by a bias of the logits
    rows.student[1, 100] = rows.student[1].max() + 1  # the top token is one that the teacher lacks
    rows.target[0] = rows.student[0, 3]
    statistics = check(spec_of(), rows)
    assert statistics[1, STATISTICS.index("top1_agreement")] == 0


@pytest.mark.parametrize("teacher_vocab", [130, 70])
@pytest.mark.parametrize("divergence", BY_ID)
def test_a_weight_for_each_loss(divergence: str, teacher_vocab: int) -> None:
    """The first row in the soft loss alone, the second in the hard loss alone."""
    weights = {"weight": torch.tensor([[2.0], [0.0]]), "hard_weight": torch.tensor([[0.0], [3.5]])}
    spec = spec_of(divergence=divergence, student=LogitTransform(scale=0.5, softcap=5.0), label_smoothing=0.1)
    rows = make_rows(130, teacher_vocab=teacher_vocab)
    check(spec, rows._replace(**weights))
    check(spec, rows._replace(weight=None, hard_weight=weights["hard_weight"]))


@pytest.mark.parametrize("divergence", BY_ID)
def test_masked_tokens(divergence: str) -> None:
    rows = make_rows(300, rows=4)
    assert rows.teacher is not None
    rows.student[0, :270] = -INF  # the first block of columns is empty
    rows.teacher[1, ::3] = -INF
    rows.student[2, ::2] = rows.teacher[2, ::2] = -INF
    rows.teacher[3] = -INF
    rows.teacher[3, 7] = 0.0  # one-hot
    target = rows.student.amax(-1, keepdim=True)
    spec = RowSpec(make_objective(DistillConfig(divergence=divergence, temperature=2.0)))
    check(spec, rows._replace(target=target))


@pytest.mark.parametrize("divergence", BY_ID)
def test_without_gradient_the_logits_are_left_alone(divergence: str) -> None:
    check(spec_of(divergence=divergence, temperature=0.5, with_gradient=False), make_rows(7))


def test_terms_smoothing_z_loss_transforms_and_row_weights_together() -> None:
    spec = spec_of(
        terms=[
            {"name": "jsd", "weight": 0.3, "temperature": 2.0},
            {"name": "reverse_kl", "weight": 0.5},
            {"name": "cosine", "weight": 0.7, "temperature": 4.0},
        ],
        label_smoothing=0.1,
        z_loss_weight=1e-3,
        soft_weight=0.7,
        hard_weight=0.4,
        student=LogitTransform(scale=0.5, softcap=5.0),
    )
    rows = make_rows(130, rows=3)
    check(spec, rows)
    check(spec, rows._replace(weight=torch.tensor([[0.0], [1.0], [2.5]])))


@pytest.mark.parametrize(
    "settings",
    [{"soft_weight": 0}, {"hard_weight": 0}, {"metrics": False}, {"divergence": "logit_mse", "metrics": False}],
)
def test_parts_left_out(settings: dict[str, object]) -> None:
    rows = make_rows(130)
    if "soft_weight" in settings:
        rows = rows._replace(teacher=None)
    if "hard_weight" in settings:
        rows = rows._replace(target=None)
    check(spec_of(**settings), rows)


def test_logits_to_1e4_and_nearly_equal_models() -> None:
    spec = RowSpec(make_objective(DistillConfig(divergence="jsd")))
    rows = make_rows(130)
    check(spec, rows._replace(student=3e3 * rows.student, teacher=3e3 * rows.teacher, target=3e3 * rows.target))
    near = rows._replace(teacher=rows.student * (1 + 1e-3))
    soft = check(spec, near)[:, 0]
    expected = row_pass(spec, *(None if t is None else t.double() for t in near))[:, 0]
    torch.testing.assert_close(soft.double(), expected, rtol=1e-2, atol=0)  # some 1e-6 nats


def test_ties_for_the_top_token_agree_as_in_the_eager_kernel() -> None:
    student = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [5.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 3.0, 1.0], [4.0, 0.0, 4.0], [0.0, 1.0, 1.0]])
    for temperature in (1.0, 2.0):
        spec = spec_of(hard_weight=0, temperature=temperature, student=LogitTransform(scale=0.3))
        statistics = check(spec, Rows(student, teacher, None))
        assert statistics[:, STATISTICS.index("top1_agreement")].tolist() == [1.0, 1.0, 0.0]


def test_nan_is_not_hidden() -> None:
    rows = make_rows(300)
    rows.student[1, 5] = float("nan")
    statistics = dispatch.run("triton", spec_of(), 2, *rows)
    assert statistics[0].isfinite().all() and rows.student[0].isfinite().all()
    assert statistics[1, :2].isnan().all() and rows.student[1].isnan().any()


def test_only_the_rows_of_the_chunk_are_touched() -> None:
    rows = make_rows(130, rows=4)
    before = rows.student.clone()
    dispatch.run("triton", spec_of(), 2, rows.student, rows.teacher, rows.target[:2], None)
    assert torch.equal(rows.student[2:], before[2:])
    assert not torch.equal(rows.student[:2], before[:2])


def test_a_registered_divergence() -> None:
    kd.register_divergence("hellinger", lambda lq, lp: 0.5 * ((lq / 2).exp() - (lp / 2).exp()) ** 2)
    check(spec_of(divergence="hellinger", temperature=2.0), make_rows(130))


@pytest.mark.parametrize(("chunk_size", "teacher_vocab"), [(1, 140), (4, 140), (64, 140), (4, 120)])
def test_distill_loss(chunk_size: int, teacher_vocab: int) -> None:
    problem = make_problem(vocab=131, teacher_vocab=teacher_vocab, dtype=torch.float32, bias=True)
    token_weights = torch.linspace(0, 2, 13)

    def run(kernel: str) -> tuple[kd.DistillOutput, list[Tensor]]:
        config = DistillConfig(
            divergence="jsd", temperature=2.0, chunk_size=chunk_size, row_kernel=kernel, label_smoothing=0.1
        )
        out = kd.distill_loss(*problem, config=config, token_weights=token_weights, **problem.biases)
        return out, gradients(out.loss, problem.leaves, 0.37)

    (out, found), (expected, wanted) = run("triton"), run("eager")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, value in expected.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    for grad, other in zip(found, wanted, strict=True):
        assert relative_error(grad, other) < 1e-6
    with torch.inference_mode():
        assert run_loss(problem, chunk_size).item() == pytest.approx(run_loss(problem, chunk_size, "eager").item())


def run_loss(problem: object, chunk_size: int, kernel: str = "triton") -> Tensor:
    config = DistillConfig(chunk_size=chunk_size, row_kernel=kernel)
    return kd.distill_loss(*problem, config=config).loss  # type: ignore[misc]


def test_distill_logits() -> None:
    rows = make_rows(131, rows=5)
    targets = torch.tensor([3, -100, 130, 0, 7])
    results = []
    for kernel in ("triton", "eager"):
        student = rows.student.clone().requires_grad_()
        out = kd.distill_logits(student, rows.teacher, targets, config=DistillConfig(row_kernel=kernel, chunk_size=3))
        results.append((out.loss.item(), *torch.autograd.grad(out.loss, student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert relative_error(results[0][1], results[1][1]) < 1e-6


@triton.jit
def _evaluate(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, FUNCTION(tl.load(x_ptr + columns)))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("expm1", -90.0, 80.0), ("log1p", -0.999, 1e30), ("tanh", -100.0, 100.0)]
)
def test_functions_that_triton_lacks(name: str, low: float, high: float) -> None:
    small = np.geomspace(1e-12, min(high, 100), 2000)
    x = np.concatenate([-small, small, np.linspace(low, min(high, 100), 94), [0.0, high]])
    x = torch.from_numpy(x[x >= low]).float()
    x = torch.nn.functional.pad(x, (0, 4096 - len(x)))
    y = torch.empty_like(x)
    _evaluate[(1,)](x, y, getattr(triton_math, name), BLOCK=4096)
    wanted = getattr(torch, name)(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=4e-7, atol=0)
    assert math.isclose(y[x == high][0].item(), getattr(np, name)(high), rel_tol=1e-6)
