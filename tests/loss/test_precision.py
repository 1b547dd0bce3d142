"""Half-precision models: fp32 logits, statistics and accumulation, measured against fp64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.loss.matmul import Operand, accumulate_outer, fastest_fp32, hidden_gradient, mm_into
from tests import oracle
from tests.loss_cases import config_of, run
from tests.oracle import Problem, gradients, make_problem, relative_error

SOFT_ONLY = {"soft_weight": 1, "hard_weight": 0}
BETAS = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}


@pytest.fixture(autouse=True, scope="module")
def give_the_buffers_back() -> Iterator[None]:
    yield
    release_workspace()


# -- late in distillation: the teacher is close to the student -----------------------------------------------


@functools.cache
def close_pair(std: float, vocab: int = 32768, rows: int = 128, width: int = 64) -> Problem:
    """bf16, one head, teacher hidden = student hidden + 1 % noise; the logits' standard deviation is `std`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(rows, width), normal(vocab, width) * (std / width**0.5)
    teacher = hidden + 0.01 * normal(rows, width)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    tensors = [t.bfloat16() for t in (hidden, weight, teacher, weight)]
    return Problem(tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2], tensors[3], targets)


def exact_loss(problem: Problem, divergence: str, scale: float = 1.0) -> tuple[float, list[Tensor]]:
    """The oracle's mean over all rows, and its gradients times `scale`, with fp64 leaves."""
    wide = problem.exact()
    teacher = wide.teacher_hidden.double() @ wide.teacher_weight.double().T
    loss = oracle.divergence(divergence, wide.hidden @ wide.weight.T, teacher, beta=0.5).mean()
    return loss.item(), gradients(loss, wide.leaves, scale)


@functools.cache
def exact(std: float, divergence: str) -> tuple[float, list[Tensor]]:
    return exact_loss(close_pair(std), divergence)


def errors(std: float, divergence: str, **settings: object) -> list[float]:
    """Relative errors of dX and dW."""
    problem = close_pair(std)
    out = run(problem, config_of(divergence, beta=0.5, chunk_size=64, **SOFT_ONLY, **settings))
    pairs = zip(gradients(out.loss, problem.leaves), exact(std, divergence)[1], strict=True)
    return [relative_error(*pair) for pair in pairs]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("std", [5.0, 30.0])
def test_gradients_are_right_to_half_a_per_cent_when_the_teacher_is_close(std: float, beta: float) -> None:
    divergence = BETAS[beta]
    assert max(errors(std, divergence)) < 5e-3
    problem = close_pair(std)
    with torch.no_grad():
        value = run(problem, config_of(divergence, beta=0.5, chunk_size=100, **SOFT_ONLY)).loss.item()
    assert value == pytest.approx(exact(std, divergence)[0], rel=1e-3)


def test_rounded_logits_really_are_rounded() -> None:
    """`logits_dtype: input` costs what the documentation says: here most of the gradient."""
    exact_logits, rounded = errors(5.0, "forward_kl"), errors(5.0, "forward_kl", logits_dtype="input")
    assert min(rounded) > 10 * max(exact_logits)
    assert min(rounded) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", BETAS.values())
def test_rounded_logits_err_no_more_than_eager_in_the_same_precision(divergence: str, dtype: torch.dtype) -> None:
    """The plain loop: logits in the models' precision, softmax and divergence in fp32, by autograd."""
    problem = make_problem(rows=61, width=33, teacher_width=33, vocab=203, dtype=dtype)
    config = config_of(divergence, temperature=2.0, chunk_size=16, logits_dtype="input")
    student = (problem.hidden @ problem.weight.T).float()
    teacher = (problem.teacher_hidden @ problem.teacher_weight.T).float()
    eager = kd.reference.distill_logits(student, teacher, problem.targets, config=config).loss
    out = run(problem, config)
    assert out.loss.item() == pytest.approx(eager.item(), rel=1e-5)
    exact_problem = problem.exact()
    wanted = gradients(exact_problem.expected(config).loss, exact_problem.leaves)
    for ours, theirs, truth in zip(
        gradients(out.loss, problem.leaves), gradients(eager, problem.leaves), wanted, strict=True
    ):
        assert relative_error(ours, truth) < 1.1 * relative_error(theirs, truth)
        assert relative_error(ours, theirs) < 4 * torch.finfo(dtype).eps
    precise = run(problem, config.model_copy(update={"logits_dtype": "float32"})).loss.item()
    truth = problem.expected(config).loss.item()
    assert abs(precise - truth) < abs(out.loss.item() - truth) / 10


def test_rounding_is_for_half_precision_only() -> None:
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(dtype=dtype)
        outs = [run(problem, config_of(logits_dtype=name)) for name in ("float32", "input")]
        assert outs[0].loss.item() == outs[1].loss.item()


# -- many rows, many chunks, many tokens --------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_fp16_gradients_of_65536_rows_are_not_flushed_to_zero(divergence: str) -> None:
    """1 / N is subnormal in fp16, and 1 / N times a probability is zero in it; the loss scale undoes that."""
    rows, scale = 65536, 65536.0
    problem = make_problem(rows, 4, 4, 23, dtype=torch.float16, ignored=())
    problem.teacher_weight = problem.weight.detach().clone()
    problem.teacher_hidden = (problem.hidden.detach() * 1.05).clone()  # small differences
    config = config_of(divergence, chunk_size=4096, beta=0.5, **SOFT_ONLY)
    found = gradients(run(problem, config).loss, problem.leaves, scale=scale)
    for grad, wanted in zip(found, exact_loss(problem, divergence, scale)[1], strict=True):
        assert grad.dtype == torch.float16
        assert relative_error(grad, wanted) < 2e-3
        large = wanted.abs() > 1e-4
        assert large.float().mean() > 0.8 and grad[large].all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("difference", [1e-2, 1e-4])
def test_no_row_of_152064_tokens_is_negative(divergence: str, difference: float) -> None:
    """The divergence of near-equal models is a sum of 152064 terms that nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(8, 152064, generator=generator)
    teacher = student + difference * torch.randn(8, 152064, generator=generator)
    eye = torch.eye(8)
    targets = torch.zeros(8, dtype=torch.int64)
    losses = kd.distill_loss_per_token(
        eye, student.T.contiguous(), eye, teacher.T.contiguous(), targets, config=config_of(divergence, **SOFT_ONLY)
    ).soft_loss
    assert losses.shape == (8,) and losses.min() > -1e-6
    wanted = oracle.divergence(divergence, student.double(), teacher.double(), beta=0.3)
    assert (losses - wanted).abs().max() < 1e-6


@functools.cache
def many_rows() -> tuple[Problem, Tensor]:
    """1024 rows in bf16, and the exact dW."""
    problem = make_problem(1024, 16, 16, 97, dtype=torch.bfloat16, ignored=())
    return problem, exact_loss(problem, "forward_kl")[1][1]


def test_the_weights_gradient_does_not_degrade_with_the_number_of_chunks() -> None:
    """Accumulated in fp32. In bf16 each of 1024 additions would round (shown below)."""
    problem, wanted = many_rows()
    found = {}
    for chunks in (1, 16, 256, 1024):
        out = run(problem, config_of("forward_kl", chunk_size=1024 // chunks, **SOFT_ONLY))
        found[chunks] = relative_error(gradients(out.loss, [problem.weight])[0], wanted)
    assert max(found.values()) < 3e-3
    assert max(found.values()) < 1.02 * min(found.values())


def test_accumulating_in_bf16_would_degrade_it() -> None:
    """What the test above would notice."""
    problem, wanted = many_rows()
    total = torch.zeros_like(problem.weight)
    for row in range(1024):
        part = replace(
            problem,
            hidden=problem.hidden[row : row + 1],
            teacher_hidden=problem.teacher_hidden[row : row + 1],
            targets=problem.targets[row : row + 1],
        )
        total += gradients(run(part, config_of("forward_kl", **SOFT_ONLY), num_items=1024).loss, [problem.weight])[0]
    assert relative_error(total, wanted) > 1e-2


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_student_and_teacher_may_differ_in_precision(hidden: torch.dtype, teacher: torch.dtype) -> None:
    problem = make_problem(rows=31, dtype=torch.float32, bias=True)
    mixed = replace(
        problem,
        hidden=problem.hidden.detach().to(hidden).requires_grad_(),
        weight=problem.weight.detach().to(hidden).requires_grad_(),
        teacher_hidden=problem.teacher_hidden.to(teacher),
        teacher_weight=problem.teacher_weight.to(teacher),
    )
    for logits_dtype, tolerance in (("float32", 1e-5), ("input", 2e-2)):
        config = config_of("jsd", temperature=2.0, logits_dtype=logits_dtype)
        wide = mixed.exact()
        out, expected = run(mixed, config), wide.expected(config)
        assert out.loss.dtype == torch.float32
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
        found = gradients(out.loss, mixed.leaves)
        for leaf, ours, truth in zip(mixed.leaves, found, gradients(expected.loss, wide.leaves), strict=True):
            assert ours.dtype == leaf.dtype
            assert relative_error(ours, truth) < max(tolerance, 2 * torch.finfo(leaf.dtype).eps)


# -- fp32 products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 64, 1001), (2, 7, 11), (17, 33, 1001), (255, 576, 4999)])
def test_fp32_products_have_fp32_precision(rows, width, vocab):
    """Whichever library multiplies: rounding operands to bf16 would be off by 4e-3, to TF32 by 5e-4."""
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (rows, vocab))
    logits = torch.empty(rows, vocab)
    mm_into(logits, hidden, Operand("test", weight, torch.float32))
    total = torch.ones(vocab, width)
    accumulate_outer(total, logits, logits, hidden, first=False)
    pairs = [
        (logits, hidden.double() @ weight.double().T),
        (hidden_gradient(logits, weight), logits.double() @ weight.double()),
        (total, 1 + logits.double().T @ hidden.double()),
    ]
    for found, wanted in pairs:
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("chosen", ["none", "ieee", "bf16"])
def test_the_users_matmul_precision_survives(chosen, request):
    settings = torch.backends.mkldnn.matmul
    request.addfinalizer(functools.partial(setattr, settings, "fp32_precision", settings.fp32_precision))
    settings.fp32_precision = chosen
    with fastest_fp32():
        pass
    assert settings.fp32_precision == chosen
    with pytest.raises(ZeroDivisionError), fastest_fp32():
        _ = 1 / 0
    assert settings.fp32_precision == chosen
