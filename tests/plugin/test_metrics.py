"""Metrics: sums over forwards, means per valid token, zero after each reading."""

from __future__ import annotations

import time

import pytest
import torch

import kd_plugin as kd
from kd_plugin.distributed.collectives import num_ranks
from kd_plugin.plugin.metrics import MetricSums, Stopwatch
from kd_plugin.settings.units import GIB
from kd_plugin.training.memory import memory_readings
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, expected_loss, make_batch, make_model

CPU = torch.device("cpu")
MEASURED = ("teacher_entropy", "student_entropy", "top1_agreement", "acceptance_rate", "kl_t1")


def test_metrics_are_the_oracles_averaged_over_tokens_of_all_forwards() -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    config = config_of("jsd", temperature=2.0)
    batches = [make_batch(seed=0), make_batch(seed=1, rows=5, length=12)]
    expected = [expected_loss(student, teacher, batch, config) for batch in batches]
    counts = [part.num_valid for part in expected]
    assert counts[0] != counts[1]

    def mean(values: list[float]) -> float:
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    plugin = kd.attach(student, teacher, config)
    for batch in batches:
        student(**batch)
    metrics = plugin.metrics()
    assert metrics["valid_tokens"] == sum(counts)
    assert metrics["loss"] == pytest.approx(mean([part.loss.item() for part in expected]), rel=1e-6)
    assert metrics["soft_loss"] == pytest.approx(mean([part.soft for part in expected]), rel=1e-6)
    assert metrics["hard_loss"] == pytest.approx(mean([part.hard for part in expected]), rel=1e-6)
    for name in MEASURED:
        assert metrics[name] == pytest.approx(mean([part.metrics[name] for part in expected]), rel=1e-6)
    assert metrics["temperature"] == 2.0 and metrics["chunk_size"] == 4.0
    assert metrics["student_ms"] > 0 and metrics["teacher_ms"] > 0 and metrics["loss_ms"] > 0
    # both models' logits of the longest batch in fp32, and the two chunk buffers in fp64 with the gradients
    assert metrics["logits_avoided_gib"] * GIB == pytest.approx(8 * counts[1] * VOCAB)
    workspace = 2 * 4 * VOCAB + 5 * 12 * 32 + VOCAB * 32
    assert metrics["loss_peak_gib"] * GIB == pytest.approx(8 * workspace)

    again = plugin.metrics()
    assert again["valid_tokens"] == 0 and again["loss"] == 0 and again["top1_agreement"] == 0
    student(**batches[0])
    assert plugin.metrics()["loss"] == pytest.approx(expected[0].loss.item(), rel=1e-6)


def test_logged_losses_do_not_depend_on_how_the_step_was_normalised() -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    batch = make_batch()
    plugin = kd.attach(student, teacher, config_of())
    student(**batch)
    first = plugin.metrics()["loss"]
    student(**batch, num_items_in_batch=1000)
    assert plugin.metrics()["loss"] == first


@pytest.mark.parametrize("settings", [{"metrics": False}, {"soft_weight": 0}])
def test_what_was_not_measured_is_not_reported(settings: dict[str, object]) -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    plugin = kd.attach(student, teacher, config_of(**settings))
    student(**make_batch())
    metrics = plugin.metrics()
    assert metrics.keys().isdisjoint(MEASURED)
    assert metrics["hard_loss"] > 0 and metrics["loss"] > 0


def test_sums_are_kept_in_fp64_and_reset_when_taken() -> None:
    sums = MetricSums(("a", "b"))
    sums.add(torch.tensor([2.0**25, 1.0]))
    for _ in range(3):
        sums.add(torch.tensor([1.0, 0.5]))
    assert sums.take(CPU) == {"a": 2.0**25 + 3, "b": 2.5}  # fp32 would have lost the ones
    assert sums.take(CPU) == {"a": 0.0, "b": 0.0}


def test_added_values_may_change_or_need_gradients_afterwards() -> None:
    sums, values = MetricSums(("a",)), torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    sums.add(values)
    with torch.no_grad():
        values += 5
    assert sums.take(CPU) == {"a": 1.0}


def test_the_stopwatch_adds_up_regions_and_resets() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.region("outer", CPU), watch.region("inner", CPU):
            time.sleep(0.01)
    elapsed = watch.take()
    assert elapsed["outer"] >= elapsed["inner"] >= 20
    assert watch.take() == {}


def test_one_process_is_one_rank() -> None:
    assert num_ranks() == 1


def test_memory_readings_are_this_processs_peak_in_gib() -> None:
    readings = memory_readings()
    assert readings.keys() in ({"peak_rss_gib"}, {"peak_allocated_gib", "peak_reserved_gib"})
    if "peak_rss_gib" in readings:
        assert 0.05 < readings["peak_rss_gib"] < 1024  # importing torch alone takes more than 50 MB
