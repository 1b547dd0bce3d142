"""bf16 products with an fp32 result by torch's own kernel: exact, or not used and said so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kd_plugin.loss import half_products, matmul
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.loss.half_products import PackedWeight
from tests.loss_cases import config_of, run, sums_of
from tests.oracle import gradients, make_problem, relative_error

needs_kernel = pytest.mark.skipif(not half_products.is_proven(), reason="this processor has no such products")


@pytest.fixture
def asked_again() -> Iterator[None]:
    half_products.is_proven.cache_clear()
    yield
    half_products.is_proven.cache_clear()
    release_workspace()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 700, 2), (129, 257, 38), (300, 5, 64), (0, 300, 8)])
def test_logits_are_those_of_fp32(rows: int, vocab: int, width: int, threads: int) -> None:
    """Rows and token ids that fill no block; a weight that starts at any place, and a result within a wider one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(width, rows, generator=generator).bfloat16().t()
    weight = torch.randn(vocab * width + 1, generator=generator).bfloat16()[1:].view(vocab, width)
    out = torch.full((rows, vocab + 3), float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        PackedWeight("test", weight).multiply_into(out[:, :vocab], hidden)
    finally:
        torch.set_num_threads(before)
    assert relative_error(out[:, :vocab], hidden.double() @ weight.double().T) < 1e-6
    assert out[:, vocab:].isnan().all()


@needs_kernel
def test_the_loss_uses_it_for_large_heads_and_errs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same loss by fp32 products of copies, which it holds half as much for."""
    problem = make_problem(13, 256, 258, 4099, 4111, dtype=torch.bfloat16)
    config = config_of("jsd", chunk_size=5)
    packed, held = run(problem, config), sums_of(problem, config).workspace_bytes
    monkeypatch.setattr(matmul, "is_proven", lambda: False)
    copied, more = run(problem, config), sums_of(problem, config).workspace_bytes
    assert more - held == 2 * 4099 * (256 + 258)
    wanted = problem.expected(config)
    for out in (packed, copied):
        assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    exact = problem.exact()
    truth = gradients(exact.expected(config).loss, exact.leaves)
    pairs = zip(gradients(packed.loss, problem.leaves), gradients(copied.loss, problem.leaves), truth, strict=True)
    for ours, theirs, right in pairs:
        assert relative_error(ours, right) < 1.01 * relative_error(theirs, right) < 5e-3


@needs_kernel
def test_without_onednn_the_packed_weight_is_not_given_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    packed, out = PackedWeight("test", weight), torch.empty(3, 5)
    monkeypatch.setattr(half_products, "_is_on", lambda: False)
    packed.packed.zero_()
    packed.multiply_into(out, hidden)
    assert relative_error(out, hidden.double() @ weight.double().T) < 1e-6


@needs_kernel
@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize("trial", ["import os; os.abort()", "raise SystemExit(1)"])
def test_a_kernel_that_ends_its_process_is_dropped_by_name(
    trial: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(half_products, "_TRIAL", trial)
    assert not half_products.is_proven()
    assert "bf16 kernel with an fp32 result fails here (exit status" in caplog.text


@needs_kernel
@pytest.mark.usefixtures("asked_again")
def test_a_kernel_that_rounds_is_dropped_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(half_products, "_product", lambda left, right: (left @ right).float())
    assert not half_products.is_proven()
    assert "bf16 kernel with an fp32 result rounds here" in caplog.text


@pytest.mark.usefixtures("asked_again")
def test_without_the_symbol_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "half_kernel", lambda: None)
    monkeypatch.setattr(half_products.subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    assert not half_products.is_proven()
