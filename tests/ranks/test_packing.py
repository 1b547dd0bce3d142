"""Two ranks over gloo: documents are kept apart under sharded models as in one process, here in the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.train_entries import run
from tests.tiny_models import make_model
from tests.tiny_runs import LETTERS, curve, make_teacher, run_config

pytestmark = pytest.mark.slow

FRESH: dict[str, Any] = {"student": {"from_teacher": None, "from_config": {"num_hidden_layers": 1}}}
RUNS = [run(name, name, train={"export": False}, **FRESH) for name in ("fsdp", "fsdp1", "zero3")]


def make_folder(folder: Path) -> Path:
    """A BLOOM, which keeps positions from its masks, and a folder of documents of 5 to 40 tokens."""
    make_teacher(folder / "teacher")  # the tokenizer
    special = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    make_model("bloom", seed=7, dtype=torch.float32, **special).save_pretrained(folder / "teacher")
    (folder / "text.txt").mkdir()
    generator = torch.Generator().manual_seed(3)
    for index, length in enumerate(torch.randint(4, 40, (60,), generator=generator).tolist()):
        letters = [LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator).tolist()]
        (folder / "text.txt" / f"{index:02}.txt").write_text("".join(letters))
    return folder


LAUNCHES = {
    "packed": Launch(train_worker, ranks=2, spec=RUNS, prepare=make_folder, together="deepspeed", needs_deepspeed=True)
}


@pytest.fixture(scope="module")
def packed(launched: Callable[[str], Launched]) -> Launched:
    return launched("packed")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = make_folder(tmp_path_factory.mktemp("packed"))
    return kd.train(run_config(folder, train={"parallel": "single", "export": False}, **FRESH))


@pytest.mark.parametrize("name", [entry["name"] for entry in RUNS])
def test_two_ranks_keep_documents_apart_like_one_process(packed: Launched, single: TrainResult, name: str) -> None:
    result = packed.file("results.pt")[0][name]
    assert curve(result) == pytest.approx(curve(single), rel=1e-4)


def test_the_way_is_said_for_both_models_in_every_layout(packed: Launched) -> None:
    for side in ("student", "teacher"):
        assert packed.printed.count(f"the {side} keeps documents apart by its attention masks") == len(RUNS)
