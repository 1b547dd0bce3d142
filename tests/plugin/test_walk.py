"""A step walks downwards through the folders: plugin, loss, row_kernels, each entered once on the way to a chunk."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

import kd_plugin as kd
from kd_plugin.row_kernels import blocks
from tests.tiny_models import make_model

PACKAGE = Path(kd.__file__).parent


def folders_on_the_stack() -> list[str]:
    """Folders of the package from the outermost call inwards; neighbours that are alike count once."""
    frame, files = sys._getframe(1), []
    while frame is not None:
        files.append(Path(frame.f_code.co_filename))
        frame = frame.f_back
    inside = [file.relative_to(PACKAGE).parts[0] for file in reversed(files) if file.is_relative_to(PACKAGE)]
    return [folder for folder, _ in itertools.groupby(inside)]


def test_hidden_states_pass_each_folder_once_on_their_way_to_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[list[str]] = []
    in_blocks = blocks.in_blocks

    def watched(*args: object) -> torch.Tensor:
        walks.append(folders_on_the_stack())
        return in_blocks(*args)

    monkeypatch.setattr("kd_plugin.row_kernels.dispatch.in_blocks", watched)
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager", chunk_size=5))
    input_ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    student.train()
    student(input_ids, labels=input_ids).loss.backward()
    assert len(walks) == 4
    assert all(walk == ["plugin", "loss", "row_kernels"] for walk in walks)
