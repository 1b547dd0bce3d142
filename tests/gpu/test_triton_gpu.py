"""The Triton kernel on a GPU: equal to the compiled kernel, and no device sync in a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kd_plugin.divergences.objective import make_objective
from kd_plugin.divergences.registry import DIVERGENCES
from kd_plugin.loss.from_hidden import loss_sums, make_problem
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.row_kernels import dispatch
from kd_plugin.row_kernels.row_pass import RowSpec
from kd_plugin.settings.run import DistillConfig
from tests.oracle import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

BY_ID = tuple(name for name in DIVERGENCES if name != "uld")


@pytest.mark.parametrize("vocab", [1, 1025, 50257])
@pytest.mark.parametrize("divergence", BY_ID)
def test_equals_the_compiled_kernel(divergence: str, vocab: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (3 * torch.randn(8, vocab, generator=generator, device="cuda") for _ in range(2))
    if vocab > 1:
        student[0, ::3] = teacher[1, ::2] = float("-inf")
    targets = student.argmax(-1, keepdim=True)
    weights = torch.linspace(0, 2, 8, device="cuda")[:, None]
    spec = RowSpec(make_objective(DistillConfig(divergence=divergence, temperature=2.0)))
    results = []
    for kernel in ("compile", "triton", "triton"):
        logits = student.clone()
        statistics = dispatch.run(kernel, spec, 8, logits, teacher, student.gather(1, targets), weights)
        results.append((statistics, logits))
    for statistics, gradient in results[1:]:
        torch.testing.assert_close(statistics, results[0][0], rtol=1e-5, atol=1e-5)
        assert relative_error(gradient, results[0][1]) < 1e-5
    assert torch.equal(results[1][1], results[2][1])


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("kernel", ["triton", "compile"])
def test_a_step_whose_rows_are_given_does_not_wait_for_the_device(kernel: str) -> None:
    hidden, weight = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (300, 1000))
    teacher_hidden, teacher_weight = torch.randn_like(hidden), torch.randn_like(weight)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    rows = torch.arange(0, 300, 2, device="cuda")
    config = DistillConfig(chunk_size=64, row_kernel=kernel)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step() -> Tensor:
        call = HeadCall(HeadTeacher(teacher_hidden, teacher_weight), targets, rows)
        sums = loss_sums(make_problem(call, config, hidden, weight.shape[0]), hidden, weight, None)
        (sums.loss_sum / 150).backward()
        return sums.loss_sum

    first = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    second = step()
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(first, second)
