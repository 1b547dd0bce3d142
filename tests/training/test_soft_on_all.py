"""`distill.soft_on: all` in a run: the losses of a step are those of its documents one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kd_plugin as kd
from kd_plugin.data.documents import load_documents
from kd_plugin.data.isolated import pack
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import idle_settings
from tests import oracle
from tests.tiny_runs import WORDS, make_teacher, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and twelve prompts with their completions, each of which fits a sequence."""
    folder = tmp_path_factory.mktemp("tiny")
    make_teacher(folder / "teacher")
    picks = torch.randint(len(WORDS), (12, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt": " ".join(WORDS[i] for i in row[:3]) + " ", "completion": WORDS[row[3]]} for row in picks]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: Path, name: str, **train: Any) -> RunConfig:
    """One step of all training documents, in one sequence each or fewer."""
    rows = str(folder / "rows.jsonl")
    sizes = {"max_steps": 1, "tokens_per_step": None, "parallel": "single", "export": False, "micro_batch_size": 1}
    sizes["eval_sequences"] = None
    data = {"train": rows, "eval": rows, "seq_len": 40}
    return run_config(folder, name, data=data, distill={"soft_on": "all"}, train={**sizes, **train})


def documents_one_by_one(config: RunConfig) -> oracle.Expected:
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=config.train.seed)
    logits, labels = ([], []), []
    for document in load_documents(config.data, load_tokenizer(config.teacher))[0]:
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        assert len(ids) <= config.data.seq_len
        for model, found in zip((student, teacher), logits, strict=True):
            with torch.no_grad():
                found.append(model(input_ids=ids[None]).logits[0, :-1])
        labels.append(torch.where(torch.tensor(document.trained[1:].copy()), ids[1:], -100))
    every, both = torch.cat(labels), [torch.cat(found) for found in logits]
    return oracle.distill_logits(*both, every, config.distill, soft_mask=torch.ones_like(every, dtype=torch.bool))


def test_the_first_step_is_over_every_token_of_its_documents(folder: Path) -> None:
    probe = config_of(folder, "probe")
    documents = load_documents(probe.data, load_tokenizer(probe.teacher))[0]
    number = len(pack(documents, probe.data, -100, seed=0, keep_tail=False, soft_on_all=True))
    wanted = documents_one_by_one(probe)
    result = kd.train(config_of(folder, "run", gradient_accumulation_steps=number))
    first = result.history[0]
    assert first["valid_tokens"] == wanted.num_valid > first["trained_tokens"] > 0
    assert first["soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
    assert first["hard_loss"] == pytest.approx(wanted.hard, rel=1e-5)
    assert first["loss"] == pytest.approx(float(wanted.loss), rel=1e-5)
    assert first["kl_t1"] == pytest.approx(wanted.metrics["kl_t1"], rel=1e-4)
    assert result.before["kl_t1"] == pytest.approx(wanted.metrics["kl_t1"], rel=1e-4)


def test_it_is_named_where_there_is_no_soft_loss(folder: Path) -> None:
    config = config_of(folder, "idle")
    without = config.model_copy(update={"distill": config.distill.model_copy(update={"soft_weight": 0.0})})
    assert "distill.soft_on has no effect: distill.soft_weight is 0" in idle_settings(without)
    assert not any("soft_on" in line for line in idle_settings(config))
