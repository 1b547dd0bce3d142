"""The keywords of a trainer with a teacher, and the folder's own imports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kd_plugin.hf
from kd_plugin.hf import DistillTrainer
from tests.hf_runs import make_tokenizer, trainer_of
from tests.refusals import refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teacher": 3}, ["teacher is a int", "its name or folder"]),
        ({"teacher": None}, ["soft_weight is 0.7 but teacher is None"]),
        ({"distill": {"temperature": 2.0}}, ["config is a dict", "DistillConfig(...)"]),
        ({"teacher_sharding": "whole"}, ["'whole'", "'shard' or 'replicate'"]),
        ({"teacher_micro_batches": 0}, ["teacher_micro_batches is 0"]),
        ({"teacher": "/nowhere/at/all"}, ["/nowhere/at/all"]),
    ],
    ids=str,
)
def test_wrong_keywords_are_named(tmp_path: Path, wrong: dict[str, Any], words: list[str]) -> None:
    refused(lambda: trainer_of(DistillTrainer, tmp_path, **wrong), *words)


def test_tokenizers_that_differ_are_refused(tmp_path: Path) -> None:
    one, other = make_tokenizer(), make_tokenizer()
    other.add_tokens(["new"])
    trainer_of(DistillTrainer, tmp_path, tokenizers=(one, one))
    with pytest.raises(ValueError, match="tokenizer"):
        trainer_of(DistillTrainer, tmp_path, tokenizers=(one, "w1"))


def test_the_package_and_its_folder_are_imported_without_the_libraries() -> None:
    code = "import sys, kd_plugin.hf; print([m for m in sys.modules if m.startswith(('torch', 'transformers'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"kd_plugin.hf.DistillTrainer needs it: pip install 'kd-plugin\[train\]'"):
        kd_plugin.hf.__getattr__("DistillTrainer")
