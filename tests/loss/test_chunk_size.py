"""Rows of a chunk on a GPU: by its speed, cut by free memory and by `loss_memory_mb`; the device is played."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import kd_plugin as kd
from kd_plugin.loss import chunk_size, device_speed
from kd_plugin.loss.chunk_size import chunk_size_on, rows_by_speed, rows_on_gpu
from kd_plugin.loss.device_speed import Speed, measured_speed, speed_by_peaks
from kd_plugin.settings.device_peaks import PEAKS, peaks_of

GIB = 2**30
H100 = speed_by_peaks(PEAKS["H100"], torch.bfloat16)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A GPU that torch would find: its name, its free memory."""
    found: dict[str, object] = {"name": "NVIDIA H100 80GB HBM3", "free": 40 * GIB}
    caches = (chunk_size._on_gpu, device_speed.speed_of)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: found["name"])
    monkeypatch.setattr(chunk_size, "free_bytes", lambda device: found["free"])
    yield found
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("name", "rows"), [("H100", 1024), ("H200", 768), ("A100", 512), ("B200", 1024), ("MI300X", 896)]
)
def test_from_these_rows_on_the_product_takes_longer_than_the_accumulation(name: str, rows: int) -> None:
    speed = speed_by_peaks(PEAKS[name], torch.bfloat16)
    found = rows_by_speed(speed)
    assert found == rows and found % 128 == 0
    width, vocab = 4096, 151936

    def seconds(chunk: int) -> tuple[float, float]:
        return 2 * chunk * width * vocab / speed.flops, 8 * width * vocab / speed.memory

    (product, accumulation), (too_short, _) = seconds(found), seconds(found - 128)
    assert product >= accumulation > too_short


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_each_device_is_found_by_the_name_that_torch_gives_it(device: str, key: str) -> None:
    assert peaks_of(device) is PEAKS[key]
    assert peaks_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("free_gib", "memory_mb", "rows", "reason"),
    [
        (40, None, 1024, "TFLOP/s"),
        (2, None, 448, "a quarter of the 2.0 GiB"),  # 0.5 GiB hold 463 rows of 8 V bytes
        (40, 512.0, 448, "loss_memory_mb 512"),
        (40, 4096.0, 1024, "TFLOP/s"),
        (1, 4096.0, 192, "a quarter of the 1.0 GiB"),
        (0.001, None, 1, "a quarter"),
    ],
)
def test_the_least_of_speed_free_memory_and_budget_decides(
    free_gib: float, memory_mb: float | None, rows: int, reason: str
) -> None:
    vocab = 144_701  # odd
    size = rows_on_gpu(H100, int(free_gib * GIB), memory_mb, vocab)
    assert size.rows == rows and reason in size.reason
    if reason != "TFLOP/s" and rows > 64:
        limit = (
            (memory_mb or 1e9) * 2**20 if "budget" in reason else min((memory_mb or 1e9) * 2**20, free_gib * GIB / 4)
        )
        assert 8 * rows * vocab <= limit < 8 * (rows + 64) * vocab


def test_a_smaller_teacher_takes_less_of_the_memory() -> None:
    both, short = (rows_on_gpu(H100, 2 * GIB, None, 144_701, other).rows for other in (None, 1000))
    assert both < short <= 1024


def test_a_budget_of_less_than_a_row_is_refused_on_a_gpu_too() -> None:
    with pytest.raises(ValueError, match="raise loss_memory_mb"):
        rows_on_gpu(H100, 40 * GIB, 0.001, 128_256)


def test_auto_on_a_gpu_asks_the_device_once(gpu: dict[str, object]) -> None:
    config = kd.DistillConfig()

    def rows(config: kd.DistillConfig = config, dtype: torch.dtype = torch.bfloat16) -> int:
        return chunk_size_on(config, 128_256, 128_256, CUDA, dtype).rows

    assert rows() == 1024
    gpu["free"] = GIB  # later: the chunks of a run do not follow it
    assert rows() == 1024
    assert rows(config.model_copy(update={"loss_memory_mb": 128.0})) == 128
    assert rows(config.model_copy(update={"chunk_size": 77})) == 77
    assert chunk_size_on(config, 128_256, 128_256, torch.device("cpu"), torch.bfloat16).rows == 512  # 512 MiB


def test_float32_products_are_slower_and_want_shorter_chunks(gpu: dict[str, object]) -> None:
    assert chunk_size_on(kd.DistillConfig(), 128_256, None, CUDA, torch.float32).rows == 128


def test_an_unknown_gpu_is_measured(gpu: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu["name"] = "NVIDIA GeForce RTX 4090"
    monkeypatch.setattr(device_speed, "measured_speed", lambda device, dtype: Speed(160e12, 1e12))
    assert chunk_size_on(kd.DistillConfig(), 32_000, None, CUDA, torch.bfloat16).rows == 640


def test_a_device_is_measured_by_what_it_does() -> None:
    small = measured_speed(torch.device("cpu"), torch.float32, size=256)
    assert 1e8 < small.flops < 1e14 and 1e8 < small.memory < 1e13
    assert rows_by_speed(small) % 128 == 0
