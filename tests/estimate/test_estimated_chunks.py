"""Rows of a chunk, as the estimate has them and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_plugin.estimate.account import estimate
from kd_plugin.estimate.tables import notes_of
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def test_chunks_of_uld_count_both_vocabularies(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(folder / "teacher", vocab_size=192).save_pretrained(tmp_path / "wide")
    teacher, student = {"model": str(tmp_path / "wide")}, {"from_teacher": None, "model": str(folder / "teacher")}
    distill = {"divergence": "uld", "loss_memory_mb": 4 * 16 * (64 + 192) / 2**20, "chunk_size": "auto"}
    estimated = estimate(run_config(folder, teacher=teacher, student=student, distill=distill))
    assert estimated.setup.chunk == 16
    (buffers,) = (line for line in estimated.memory.phases["loss"] if line.name == "chunk buffers")
    assert buffers.num_bytes == 4 * 16 * (64 + 192)
    assert "(4 B x (V 64 + V' 192)) = 16 rows" in notes_of(estimated)[0]


@pytest.mark.parametrize(
    ("settings", "rows", "note"),
    [
        ({}, 768, "768 rows, at which H200's products take longer than its memory"),
        ({"loss_memory_mb": 128.0}, 768, "768 rows, at which"),  # 128 MiB hold 1448
        ({"loss_memory_mb": 32.0}, 320, "32 MiB / (8 B x V 11584) = 362 -> 320 (a multiple of 64) rows"),
        ({"chunk_size": 100}, 100, "100 rows, as distill.chunk_size says; auto would give 768"),
    ],
)
def test_chunks_on_a_gpu_follow_its_speed(
    folder: Path, tmp_path: Path, settings: dict[str, object], rows: int, note: str
) -> None:
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(folder / "teacher", vocab_size=11584).save_pretrained(tmp_path)
    student = {"from_teacher": None, "model": str(tmp_path), "dtype": "bfloat16"}
    config = run_config(
        folder,
        teacher={"model": str(tmp_path)},
        student=student,
        distill={"chunk_size": "auto", **settings},
        data={"seq_len": 128},
        train={"micro_batch_size": 12, "tokens_per_step": None},
    )
    estimated = estimate(config, gpu="H200")
    assert estimated.setup.chunk == rows
    assert note in notes_of(estimated)[0]


def test_chunks_on_a_cpu_follow_their_memory(folder: Path) -> None:
    config = run_config(folder, distill={"chunk_size": "auto"})
    assert "512 MiB / (8 B x V 64) = 1048576 rows" in notes_of(estimate(config, device="cpu", speeds=SPEEDS))[0]
