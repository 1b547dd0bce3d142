"""The row kernels: one graph whatever the batch, and the compiled kernel equal to the eager one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import kd_plugin as kd
from kd_plugin.divergences.objective import make_objective
from kd_plugin.row_kernels import blocks, dispatch, expressions
from kd_plugin.row_kernels.row_pass import LogitTransform, RowSpec, row_pass, subtract_labels
from kd_plugin.row_kernels.statistics import STATISTICS
from tests.loss_cases import check, config_of, run
from tests.oracle import DIVERGENCES, gradients, make_problem, relative_error

# One row, two rows, one below, at and above the chunk size of 8, and its multiples.
LENGTHS = (13, 1, 8, 2, 7, 9, 16, 15, 17, 3, 24, 5, 1, 33, 10, 4, 12, 31, 6, 40)


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graph of an earlier test may be found; a recompilation is an error."""
    torch._dynamo.reset()
    dispatch._compiled.cache_clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def test_twenty_batches_of_varying_length_share_one_graph(fresh_compiler: None) -> None:
    before = graphs_compiled()
    for seed, rows in enumerate(LENGTHS):
        ignored = () if rows < 4 or seed % 3 == 0 else (1, 3)
        problem = make_problem(rows=rows, dtype=torch.float32, ignored=ignored, seed=seed)
        compiled = run(problem, config_of("jsd", chunk_size=8, row_kernel="compile"))
        eager = run(problem, config_of("jsd", chunk_size=8, row_kernel="eager"))
        assert compiled.loss.item() == pytest.approx(eager.loss.item(), rel=1e-6)
        pairs = zip(gradients(compiled.loss, problem.leaves), gradients(eager.loss, problem.leaves), strict=True)
        for found, wanted in pairs:
            assert relative_error(found, wanted) < 1e-5
    assert len(LENGTHS) == 20
    assert graphs_compiled() - before == 1


def test_a_batch_cut_into_cache_sized_blocks_shares_the_graph(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks._BLOCK_BYTES, "cpu", 8 * 11 * 4)  # four rows of eleven logits
    before = graphs_compiled()
    for rows in (1, 3, 4, 5, 6, 8, 9, 13):
        problem = make_problem(rows=rows, ignored=())
        check(problem, config_of("forward_kl", chunk_size=64, row_kernel="compile"), tolerance=1e-12)
    assert graphs_compiled() - before == 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_compiled_kernel_equals_the_oracle(divergence: str) -> None:
    problem = make_problem(vocab=11, teacher_vocab=14, bias=True)
    for chunk_size in (1, 2, 4, 8, 9, 64):
        config = config_of(divergence, temperature=2.0, chunk_size=chunk_size, row_kernel="compile")
        check(problem, config, tolerance=1e-12, scale=0.37)


def test_compiled_with_token_weights_and_without_gradients() -> None:
    problem = make_problem()
    weights = torch.linspace(0, 2, 13)
    config = config_of("reverse_kl", chunk_size=4, row_kernel="compile")
    check(problem, config, tolerance=1e-12, token_weights=weights)
    wanted = run(problem, config, token_weights=weights).loss.item()
    with torch.no_grad():
        assert run(problem, config, token_weights=weights).loss.item() == pytest.approx(wanted, rel=1e-12)


def transformed(student: Tensor, teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """Softcap and scale written out."""

    def apply(logits: Tensor, transform: LogitTransform) -> Tensor:
        logits = transform.scale * logits
        return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)

    return apply(student, spec.student), apply(teacher, spec.teacher)


TRANSFORMS = {
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=2.0),
    "both": LogitTransform(scale=3.0, softcap=4.0),
}


@pytest.mark.parametrize(
    ("transform", "kernel"), [("scale", "eager"), ("softcap", "eager"), ("both", "eager"), ("both", "compile")]
)
def test_gradients_pass_through_scale_and_softcap(transform: str, kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 9, (6, 1), generator=generator)
    config = config_of("jsd", temperature=2.0)
    spec = RowSpec(make_objective(config), TRANSFORMS[transform], LogitTransform(scale=0.5, softcap=3.0))

    student.requires_grad_()
    reference = kd.reference.distill_logits(*transformed(student, teacher, spec), targets[:, 0], config=config)
    (wanted,) = torch.autograd.grad(reference.loss * 6, student)

    buffer = student.detach().clone()
    target_logits = buffer.gather(1, targets)
    statistics = dispatch.run(kernel, spec, 6, buffer, teacher, target_logits, None)
    subtract_labels(spec, buffer, targets, target_logits, None)
    torch.testing.assert_close(buffer, wanted, rtol=1e-11, atol=1e-14)
    means = dict(zip(STATISTICS, statistics.mean(0).tolist(), strict=True))
    assert means["soft_loss"] == pytest.approx(reference.soft_loss.item(), rel=1e-12)
    assert means["hard_loss"] == pytest.approx(reference.hard_loss.item(), rel=1e-12)
    for name, value in reference.metrics.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kernel", ["compile", "eager"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_sums_over_a_large_vocabulary_keep_the_digits_of_its_logits(divergence: str, kernel: str) -> None:
    """Models that are sure, each of something else: these gradients are small differences of large sums."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 49152, generator=generator) * 3 for _ in range(2))
    student[:, 7] += 15
    teacher[:, 11] += 15
    objective = make_objective(config_of(divergence, soft_weight=1.0, hard_weight=0.0, metrics=False))
    wanted, found = student.double(), student.clone()
    row_pass(RowSpec(objective), wanted, teacher.double(), None, None)
    dispatch.run(kernel, RowSpec(objective), 4, found, teacher, None, None)
    assert relative_error(found, wanted) < 2e-6


def test_without_gradient_the_logits_are_left_alone() -> None:
    spec = RowSpec(make_objective(config_of(hard_weight=0)), with_gradient=False)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    before = student.clone()
    row_pass(spec, student, teacher, None, None)
    assert torch.equal(student, before)


def test_rows_past_the_chunk_are_not_read() -> None:
    spec = RowSpec(make_objective(config_of(hard_weight=0)))
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    student[3], teacher[3] = float("nan"), float("nan")
    for kernel in ("eager", "compile"):
        buffer = student.clone()
        assert dispatch.run(kernel, spec, 3, buffer, teacher, None, None).isfinite().all()
        assert buffer[:3].isfinite().all()


def test_auto_takes_the_compiler_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for found, expected in (("/usr/bin/g++", "compile"), (None, "eager")):
        dispatch.choose.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        with caplog.at_level(logging.INFO):
            assert dispatch.choose("auto", "cpu") == expected
        assert f"auto -> {expected}" in caplog.text
        assert dispatch.choose("eager", "cpu") == "eager"
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("temperature", [0.5, 1.7, 2.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_a_second_temperature_costs_one_more_exponential(divergence: str, temperature: float) -> None:
    """The soft loss at T, cross-entropy at 1: the student's probabilities are wanted at both, the teacher's at T."""

    def exponentials(temperature: float) -> int:
        config = config_of(divergence, temperature=temperature, metrics=False)
        found = expressions.trace(RowSpec(make_objective(config)), 64, ("student", "teacher", "target"))
        needed, waiting = set(), list(found.gradients.values())
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.operands
        return sum(node.per_token and "exp" in node.template for node in needed)

    assert exponentials(1.0) >= 2
    assert exponentials(temperature) == exponentials(1.0) + 1


class Uncompilable:
    """A row pass whose compilation ends in an error of the backend, as some releases of torch have them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        compile_ = torch.compile

        def broken(graph: object, inputs: object) -> object:
            self.calls += 1
            raise KeyError("buf0")

        def with_broken_backend(body: object, **options: object) -> object:
            options.pop("options")
            return compile_(body, backend=broken, **options)

        monkeypatch.setattr(torch, "compile", with_broken_backend)


def test_a_kernel_that_cannot_be_compiled_runs_eager_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Uncompilable(monkeypatch)
    config = kd.DistillConfig(divergence="forward_kl", temperature=1.37, chunk_size=4, row_kernel="compile")
    problem = make_problem()
    with caplog.at_level(logging.WARNING, "kd_plugin"):
        outs = [kd.distill_loss(*problem, config=config) for _ in range(2)]
    eager = kd.distill_loss(*problem, config=config.model_copy(update={"row_kernel": "eager"}))
    assert [out.loss.item() for out in outs] == [eager.loss.item()] * 2
    assert backend.calls == 1
    (message,) = [message for message in caplog.messages if "cannot compile" in message]
    assert "(BackendCompilerFailed: backend='broken' raised: KeyError: 'buf0')" in message
    assert "runs eager now" in message
