"""A fast product that rounds where it must not is found out before its first use, and dropped with a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kd_plugin.loss import matmul, proven
from kd_plugin.loss.proven import is_exact, relative_error

CPU = torch.device("cpu")


def rounded_to(dtype: torch.dtype) -> proven.Product:
    """A product whose operands are rounded to `dtype` first, as a library with matrix units may do."""
    return lambda left, right: left.to(dtype).float() @ right.to(dtype).float()


def fails(left: Tensor, right: Tensor) -> Tensor:
    raise RuntimeError("out_dtype is not supported\nsecond line")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_that_rounds_its_operands_is_dropped(caplog: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    with caplog.at_level(logging.WARNING, "kd_plugin"):
        assert not is_exact("fast product", rounded_to(dtype), torch.float32, CPU, "the slow one is used")
    (message,) = caplog.messages
    assert message.startswith("fast product rounds here (relative error ")
    assert message.endswith("against fp64): the slow one is used")


def test_a_product_that_rounds_its_result_is_dropped() -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.float() @ right.float()).bfloat16()

    assert not is_exact("product", product, torch.bfloat16, CPU, "")


def test_a_product_that_fails_is_dropped_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kd_plugin"):
        assert not is_exact("fast product", fails, torch.float32, CPU, "the slow one is used")
    assert caplog.messages == ["fast product fails here (out_dtype is not supported): the slow one is used"]


def test_a_product_that_gives_nan_is_dropped() -> None:
    assert not is_exact("product", lambda left, right: left @ right * float("nan"), torch.float32, CPU, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp32_sums_pass_by_a_wide_margin(caplog: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        return left.float() @ right.float()

    assert relative_error(product, dtype, CPU) < proven._TOLERANCE / 10
    assert is_exact("product", product, dtype, CPU, "")
    assert not caplog.messages


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """The answer about oneDNN is kept for the process."""
    matmul._onednn_is_exact_and_faster.cache_clear()
    yield
    matmul._onednn_is_exact_and_faster.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("error", [1e-6, 2e-3])
def test_onednn_multiplies_only_where_it_has_proven_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: float
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "AMD EPYC"})
    monkeypatch.setattr(proven, "relative_error", lambda *_: error)
    with caplog.at_level(logging.WARNING, "kd_plugin"), matmul.fastest_fp32():
        precision = matmul._onednn_products().fp32_precision
    assert (precision == "bf16") == (error < 1e-5)
    dropped = ["oneDNN's fp32 product"] if error > 1e-5 else []
    assert [message.partition(" rounds")[0] for message in caplog.messages] == dropped


@pytest.mark.usefixtures("asked_anew")
def test_the_proof_multiplies_as_the_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library under suspicion, not by the one that is always exact."""
    seen: list[str] = []

    def error_of(product: proven.Product, dtype: torch.dtype, device: torch.device) -> float:
        def watched(left: Tensor, right: Tensor) -> Tensor:
            return torch.zeros(len(left), right.shape[1])

        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", lambda *_: seen.append(matmul._onednn_products().fp32_precision) or watched(*_))
            return float(product(torch.zeros(2, 3), torch.zeros(3, 4)).sum())

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "AMD EPYC"})
    monkeypatch.setattr(proven, "relative_error", error_of)
    assert matmul._onednn_is_exact_and_faster()
    assert seen == ["bf16"]
    assert matmul._onednn_products().fp32_precision != "bf16"
