"""`teacher.input`: a run whose teacher reads another text gives the losses of each conversation by itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kd_plugin as kd
from kd_plugin.cli.commands import app
from kd_plugin.data.documents import load_documents
from kd_plugin.data.isolated import pack
from kd_plugin.data.packing import Document
from kd_plugin.data.teacher_text import teacher_reader_of
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import early_problems, idle_settings
from tests import oracle
from tests.tiny_models import make_model
from tests.tiny_runs import make_teacher, run_config

CHAT = (
    "{% for message in messages %}{{ message.role + ', ' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant, ' }}{% endif %}"
)
OWN = CHAT.replace("message.role + ', '", "'a ' + message.role + '. '").replace("'assistant, '", "'a assistant. '")
SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def make_folder(folder: Path, model: str) -> Path:
    """A teacher of this architecture with a chat template, and thirty conversations."""
    make_teacher(folder / "teacher")
    made = make_model(model, seed=7, dtype=torch.float32, max_position_embeddings=256, **SIZES)
    made.save_pretrained(folder / "teacher")
    (folder / "teacher" / "chat_template.jinja").write_text(CHAT)
    pairs = [(f"ask {a}{b}", f"so {b} is {a}"[: 4 + number]) for number, a in enumerate("abcdef") for b in "vwxyz"]
    rows = []
    for number, (ask, say) in enumerate(pairs):
        turns = [("user", ask), ("assistant", say), ("user", "why"), ("assistant", f"it {ask}")][: 2 + 2 * (number % 2)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: Path, name: str = "run", **sections: Any) -> RunConfig:
    """One step of two micro-batches, in which the teacher has a system prompt and another template."""
    rows = str(folder / "rows.jsonl")
    teacher = {"input": {"system": "be short", "chat_template": OWN}, **sections.pop("teacher", {})}
    train = {"max_steps": 1, "tokens_per_step": None, "parallel": "single", "export": False, "micro_batch_size": 1}
    return run_config(
        folder,
        name,
        teacher=teacher,
        student={"from_teacher": None, "from_config": {"num_hidden_layers": 2}},
        data={"train": rows, "eval": rows, "seq_len": 120, **sections.pop("data", {})},
        train={**train, **sections.pop("train", {})},
        **sections,
    )


def documents_of(config: RunConfig) -> list[Document]:
    tokenizer = load_tokenizer(config.teacher)
    return load_documents(config.data, tokenizer, teacher_reader_of(config, tokenizer))[0]


def one_by_one(config: RunConfig) -> oracle.Expected:
    """Every conversation in forwards of its own, by plain models."""
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=config.train.seed)
    students, teachers, labels = [], [], []
    for document in documents_of(config):
        assert document.teacher is not None
        places = torch.from_numpy(document.trained.nonzero()[0])
        ids, theirs = (torch.from_numpy(x.input_ids).long()[None] for x in (document, document.teacher))
        with torch.no_grad():
            students.append(student(input_ids=ids).logits[0, places - 1])
            teachers.append(teacher(input_ids=theirs).logits[0, torch.from_numpy(document.teacher.at)[places] - 1])
        labels.append(ids[0, places])
    return oracle.distill_logits(torch.cat(students), torch.cat(teachers), torch.cat(labels), config.distill)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_first_step_and_evaluation_are_of_each_conversation_by_itself(tmp_path: Path, model: str) -> None:
    probe = config_of(make_folder(tmp_path, model))
    wanted, documents = one_by_one(probe), documents_of(probe)
    assert all(document.teacher is not None for document in documents) and len(documents) == 30
    number = len(pack(documents, probe.data, -100, seed=0, keep_tail=False))
    train = {"gradient_accumulation_steps": number, "max_steps": 2, "eval_sequences": None, "learning_rate": 1e-30}
    result = kd.train(config_of(tmp_path, train=train))
    for step in result.history[:2]:  # of which the second reads ahead
        assert step["valid_tokens"] == wanted.num_valid
        assert step["soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
        assert step["hard_loss"] == pytest.approx(wanted.hard, rel=1e-5)
        assert step["loss"] == pytest.approx(float(wanted.loss), rel=1e-5)
    assert result.before["kl_t1"] == pytest.approx(wanted.metrics["kl_t1"], rel=1e-5)
    plain = kd.train(config_of(tmp_path, "plain", teacher={"input": None}))
    assert plain.before["kl_t1"] != pytest.approx(wanted.metrics["kl_t1"], rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("own"), "llama")


def test_what_does_not_go_together_is_found_before_anything_is_loaded(folder: Path) -> None:
    faults = early_problems(config_of(folder, data={"packing": "joined"}, distill={"soft_on": "all"}))
    assert [fault.partition(",")[0] for fault in faults] == ["teacher.input is set", "teacher.input is set"]
    assert "data.packing to isolated" in faults[0] and "distill.soft_on to trained" in faults[1]
    (fault,) = early_problems(config_of(folder, teacher={"input": {"chat_template": "none.jinja"}}))
    assert fault.startswith("teacher.input.chat_template: none.jinja cannot be read (No such file or directory)")
    assert early_problems(config_of(folder)) == []
    idle = idle_settings(config_of(folder, distill={"soft_weight": 0.0}))
    assert "teacher.input has no effect: distill.soft_weight is 0" in idle


def test_what_is_left_out_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        documents = documents_of(config_of(folder))
    assert (
        "data.cache: data.train is tokenised by every process: the cache has no room for teacher.input" in caplog.text
    )
    with caplog.at_level(logging.WARNING):
        pack(documents, config_of(folder, data={"seq_len": 80}).data, -100, seed=0, keep_tail=True)
    assert "conversation(s) are left out, longer than data.seq_len 80 in one of the two texts" in caplog.text


def test_the_preview_shows_both_texts_of_the_first_conversation(folder: Path) -> None:
    config = folder / "c.yaml"
    config.write_text(
        "student: {from_teacher: {layers: 2}}\n"
        f"teacher: {{model: {folder / 'teacher'}, input: {{system: be short}}}}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, seq_len: 200}}\n"
    )
    done = CliRunner().invoke(app, ["data", str(config), "--rows", "1"], prog_name="kd-plugin")
    assert done.exit_code == 0, done.output
    student, teacher = done.stdout.split("the first conversation as the ")[1:]
    said = student.splitlines()[1]
    assert said.startswith("user, ask ") and "[[so " in said
    assert teacher.splitlines()[1] == f"system, be short</s>{said}"
