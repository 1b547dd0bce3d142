"""Half precision by what the processor is: the same in every run, and on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from kd_plugin.loss import processor
from kd_plugin.loss.buffers import buffer, release_workspace
from kd_plugin.loss.matmul import Operand
from kd_plugin.row_kernels import blocks

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    processor._say.cache_clear()
    yield
    processor._say.cache_clear()
    processor._emulated_elsewhere.clear()


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"avx512_bf16": True, "avx512_fp16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_busy_machine_decides_as_an_idle_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product and no clock are asked."""
    before = processor.multiplies(dtype)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("a stopwatch"))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *_: pytest.fail("a product"))
    assert [processor.multiplies(dtype) for _ in range(3)] == [before] * 3


@pytest.mark.usefixtures("native", "group")
def test_one_older_rank_makes_all_take_the_wider_way(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    operand = Operand("test", weight, torch.float32)
    assert operand.for_gradient is weight
    caplog.clear()
    processor.settle([{"bfloat16": False, "float16": False}, {"bfloat16": True, "float16": False}])
    for _ in range(2):
        assert operand.for_gradient is operand.wide
    assert caplog.messages == ["bfloat16 products: in float32 (another rank's processor lacks it)"]
    assert processor.multiplies(torch.float16)
    processor.settle([processor.emulated_here()])
    assert operand.for_gradient is weight


@pytest.mark.usefixtures("native")
def test_what_ranks_settled_ends_with_their_group(group: None) -> None:
    processor.settle([{"bfloat16": True, "float16": True}])
    assert not processor.multiplies(torch.float16)
    dist.destroy_process_group()
    try:
        assert processor.multiplies(torch.float16)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_float32_is_always_multiplied() -> None:
    assert processor.multiplies(torch.float32) and processor.multiplies(torch.float64)


def test_buffers_of_the_host_stay_there_whatever_the_default_device() -> None:
    release_workspace()
    with torch.device("meta"):
        found = buffer("test", 2, 3, torch.float32, torch.device("cpu"))
    assert found.device.type == "cpu"
    release_workspace()


def test_a_graph_is_compiled_without_a_stopwatch() -> None:
    """Nor does it change how anything else is compiled."""
    import torch._functorch.config as autograd
    import torch._inductor.config as inductor
    from torch._inductor.graph import GraphLowering

    seen: list[bool] = []
    original = GraphLowering.run

    def run(graph: GraphLowering, *arguments: Any) -> Any:
        seen.append(inductor.deterministic)
        return original(graph, *arguments)

    before = inductor.deterministic
    uncached = autograd.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False)
    with uncached[0], uncached[1], patch.object(GraphLowering, "run", run):
        found = blocks.compiled(lambda rows: rows.sum(1, keepdim=True) + 1)(torch.ones(3, 5))
    assert found.flatten().tolist() == [6.0, 6.0, 6.0]
    assert seen == [True] and inductor.deterministic == before
