"""Ids that one of the two models cannot embed: allowed where they do not occur, named where they do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.data.known_ids import VocabularyError
from kd_plugin.settings.run import RunConfig
from tests.tiny_models import make_model
from tests.tiny_runs import make_folder, run_config

WORDS = "the quick brown fox jumps over a lazy dog "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher (64 rows), `extended` (its tokenizer with <think>, id 64) and `student`, a model with 65 rows."""
    from transformers import AutoTokenizer

    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    fillers = [f"<{index}>" for index in range(len(tokenizer), 64)]
    tokenizer.add_tokens([*fillers, "<think>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<think>") == 64
    tokenizer.save_pretrained(folder / "extended")
    sizes = {"vocab_size": 65, "num_hidden_layers": 1, "max_position_embeddings": 128}
    make_model("llama", dtype=torch.float32, **sizes).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return folder


def config_of(folder: Path, rows: list[dict[str, str]], *, held_out: str = WORDS, **sections: Any) -> RunConfig:
    """Both files hold enough for a sequence of 32 tokens; ids differ from the teacher's for <think> only."""
    train, other = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text(json.dumps({"text": held_out}) + "\n")
    sections.setdefault("student", {"model": str(folder / "student"), "from_teacher": None})
    sections.setdefault("train", {"max_steps": 1, "warmup_steps": 0, "export": False})
    return run_config(folder, data={"train": str(train), "eval": str(other)}, **sections)


def said(config: RunConfig) -> list[str]:
    with pytest.raises(VocabularyError) as caught:
        kd.train(config)
    return str(caught.value).splitlines()


def test_a_tokenizer_with_extra_tokens_trains_as_long_as_they_do_not_occur(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = kd.train(config_of(folder, [{"text": WORDS * 20}]))
    assert result.step == 1
    assert "1 token(s) of the tokenizer, first '<think>' (id 64), are not embedded by the teacher" in caplog.text


def test_an_id_is_named_with_its_place_its_token_and_the_model_that_lacks_it(folder: Path) -> None:
    rows = [{"text": WORDS}, {"text": "the <think> fox " + WORDS}]
    (line,) = said(config_of(folder, rows))
    assert line == (
        f"training data: document 2 ({folder}/train.jsonl:2), token 5 is id 64 ('<think>'), but the teacher embeds "
        "ids 0 to 63 only (1 such token(s) in all): take the token out of the text, or use a teacher that knows it"
    )
    (line,) = said(config_of(folder, [{"text": WORDS}], held_out=WORDS + "<think>"))
    assert line.startswith(f"held-out data: document 1 ({folder}/held_out.jsonl:1), token 43 is id 64")


def test_an_id_that_is_no_label_counts_as_well(folder: Path) -> None:
    rows = [{"prompt": "<think> the", "completion": WORDS}]
    assert said(config_of(folder, rows))[0].startswith("training data: document 1")


def test_advice_is_for_the_model_that_lacks_the_row(folder: Path) -> None:
    text = [{"text": WORDS + "<think>"}]
    larger = {"model": str(folder / "student"), "dtype": "float32"}
    smaller = {"from_config": {"vocab_size": 64}, "model": None, "dtype": "float32", "from_teacher": None}
    (line,) = said(config_of(folder, text, teacher=larger, student=smaller))
    assert "the student embeds ids 0 to 63 only" in line and "student.from_config.vocab_size" in line
    both = {"model": str(folder / "teacher"), "tokenizer": str(folder / "extended"), "dtype": "float32"}
    lines = said(config_of(folder, text, teacher=both, student={**both, "from_teacher": None}))
    assert [role for line in lines for role in ("student", "teacher") if f"the {role} embeds" in line] == [
        "teacher",
        "student",
    ]


def test_a_teacher_that_is_not_asked_need_not_know_an_id(folder: Path) -> None:
    distill = {"soft_weight": 0.0, "hard_weight": 1.0, "row_kernel": "eager"}
    text = [{"text": WORDS + "<think>"}]
    assert kd.train(config_of(folder, text, distill=distill)).step == 1
    log = {"output_dir": str(folder / "run"), "tensorboard": False, "sample_prompt": "a <think>"}
    (line,) = said(config_of(folder, text, distill=distill, log=log))
    assert line.startswith("log.sample_prompt: token 3 is id 64 ('<think>'), but the teacher embeds")
