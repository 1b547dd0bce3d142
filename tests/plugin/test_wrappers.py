"""A student that is trained past its wrapper, or was compiled: said with the recipe, or right all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines.fsdp_units import make_mesh
from tests.tiny_models import expected_loss, make_batch, make_model

CONFIG = kd.DistillConfig(row_kernel="eager", chunk_size=7)


def models() -> tuple[nn.Module, nn.Module]:
    return make_model("llama", seed=1).train(), make_model("llama", seed=2)


class TestPastTheWrapper:
    @pytest.fixture(autouse=True)
    def process_group(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def warnings_of(self, model: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
        """What is said in one forward."""
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model(**make_batch())
        return [record.getMessage() for record in caplog.records if record.name.startswith("kd_plugin")]

    def test_ddp_is_missed_once_with_the_recipe(self, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        wrapper = DistributedDataParallel(student)
        assert self.warnings_of(wrapper, caplog) == []
        (message,) = self.warnings_of(wrapper.module, caplog)
        assert "call the wrapper" in message and "ddp.module(...)" in message and "\n" not in message
        assert self.warnings_of(student, caplog) == []

    def test_ddp_put_around_a_module_that_holds_the_student(self, caplog: pytest.LogCaptureFixture) -> None:
        class Outer(nn.Module):
            def __init__(self, student: nn.Module) -> None:
                super().__init__()
                self.student = student

            def forward(self, **inputs: Any) -> Any:
                return self.student(**inputs).loss

        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        wrapper = DistributedDataParallel(Outer(student))
        assert self.warnings_of(wrapper, caplog) == []
        assert len(self.warnings_of(student, caplog)) == 1

    def test_ddp_that_came_before_attach(self, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        wrapper = DistributedDataParallel(student)
        kd.attach(wrapper, teacher, CONFIG)
        assert self.warnings_of(wrapper, caplog) == []
        assert len(self.warnings_of(student, caplog)) == 1

    def test_nothing_is_said_where_no_gradient_is_lost(self, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        plugin = kd.attach(student, teacher, CONFIG)
        assert self.warnings_of(student, caplog) == []  # nothing wrapped yet
        wrapper = DistributedDataParallel(student)
        with torch.no_grad():
            assert self.warnings_of(student, caplog) == []
        student.eval()
        assert self.warnings_of(student, caplog) == []
        student.train()
        del wrapper
        assert self.warnings_of(student, caplog) == []
        plugin.detach()
        other = DistributedDataParallel(student)  # no longer of interest
        assert self.warnings_of(other.module, caplog) == []

    def test_ddp_around_another_model_is_none_of_its_business(self, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        other = DistributedDataParallel(nn.Linear(2, 2))
        assert self.warnings_of(student, caplog) == [] and other is not None

    def test_fsdp2_is_the_module_itself(self, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        fully_shard(student, mesh=make_mesh("cpu", 1))
        assert self.warnings_of(student, caplog) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile itself reads it
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_student_has_one_loss_inside_and_outside(compiled_first: bool) -> None:
    torch._dynamo.reset()
    student, teacher = models()
    batch = make_batch()
    expected = expected_loss(student, teacher, batch, CONFIG).loss
    graphs = CompileCounterWithBackend("eager")
    if not compiled_first:
        kd.attach(student, teacher, CONFIG)
    compiled = torch.compile(student, backend=graphs)
    if compiled_first:
        compiled(**batch)  # what is compiled by now must not be used again
        graphs.graphs.clear()
        kd.attach(compiled, teacher, CONFIG)
    for model in (compiled, student, compiled):
        loss = model(**batch).loss
        torch.testing.assert_close(loss, expected.to(loss))
    assert max(len(graph.graph.nodes) for graph in graphs.graphs) > 100, "the student's layers are compiled no more"
