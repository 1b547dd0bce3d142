"""What an attached student measures piles up nowhere, and is about the time since it was last asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kd_plugin as kd
from kd_plugin.plugin import metrics
from kd_plugin.plugin.metrics import MetricSums, Stopwatch
from kd_plugin.settings.units import GIB
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, make_batch, make_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeGpu:
    """Records when events happen; `done` of them are over, in milliseconds of an event each."""

    def __init__(self) -> None:
        self.recorded, self.done, self.waited = 0, 0, 0

    def event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0

    def record(self) -> None:
        self.gpu.recorded += 1
        self.at = self.gpu.recorded

    def query(self) -> bool:
        return self.at <= self.gpu.done

    def synchronize(self) -> None:
        self.gpu.waited += 1
        self.gpu.done = max(self.gpu.done, self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.query(), "a GPU would refuse"
        return float(other.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    yield gpu


def test_events_that_nobody_asks_for_do_not_pile_up(gpu: FakeGpu) -> None:
    """The GPU lags ten events behind; nobody waits for it."""
    watch, most = Stopwatch(), 0
    for _ in range(1000):
        with watch.region("outer", CUDA), watch.region("inner", CUDA):
            gpu.done = max(0, gpu.recorded - 10)
        most = max(most, len(watch._events))
    assert most <= 10 and gpu.waited == 0
    assert watch.take() == {"outer": 3000.0, "inner": 1000.0}
    assert watch.take() == {}


def test_a_gpu_that_is_far_behind_is_waited_for_only_when_asked(gpu: FakeGpu) -> None:
    watch = Stopwatch()
    for _ in range(5):
        with watch.region("loss", CUDA):
            pass
    assert gpu.waited == 0
    assert watch.take() == {"loss": 5.0} and gpu.waited > 0


def test_peaks_are_those_since_the_last_call() -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    plugin = kd.attach(student, teacher, config_of())
    large, small = make_batch(seed=0, rows=5, length=12), make_batch(seed=1, rows=2, length=6)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in (large, small)]
    student(**large)
    student(**small)
    first = plugin.metrics()
    assert first["logits_avoided_gib"] * GIB == pytest.approx(8 * counts[0] * VOCAB)
    student(**small)
    second = plugin.metrics()
    assert second["logits_avoided_gib"] * GIB == pytest.approx(8 * counts[1] * VOCAB)
    assert 0 < second["loss_peak_gib"] < first["loss_peak_gib"]
    student(**large)
    assert plugin.metrics()["loss_peak_gib"] == first["loss_peak_gib"]


def test_what_is_unmeasured_leaves_no_trace() -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    plugin = kd.attach(student, teacher, config_of())
    student(**make_batch(seed=1, rows=2, length=6))
    expected = plugin.metrics()
    student(**make_batch(seed=1, rows=2, length=6))
    with plugin.unmeasured(), torch.no_grad():
        student(**make_batch(seed=0, rows=5, length=12))
    found = plugin.metrics()
    assert all(found[name] == expected[name] for name in found if not name.endswith("_ms"))


def test_sums_stay_in_fp32_where_there_is_no_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs, where `.double()` raises; also for a rank that has measured nothing."""
    monkeypatch.setattr(metrics, "_WITHOUT_FP64", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: pytest.fail("no fp64 here"))
    sums = MetricSums(("a", "b"))
    assert sums.take(CPU, largest={"c": 0.5}) == {"a": 0.0, "b": 0.0, "c": 0.5}
    sums.add(torch.tensor([1.0, 2.0]))
    assert sums.take(CPU) == {"a": 1.0, "b": 2.0}
