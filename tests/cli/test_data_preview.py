"""`kd-plugin data`: what is trained on, what is left out, and no model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from kd_plugin.cli.commands import app
from kd_plugin.cli.data_preview import marked
from tests.tiny_runs import make_teacher

pytest.importorskip("transformers")

CHAT = (
    "{% for message in messages %}{{ message.role + ', ' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant, ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template, and no weights."""
    folder = make_teacher(tmp_path_factory.mktemp("teacher"))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "model.safetensors").unlink()
    return folder


def run(teacher: Path, data: Path, *arguments: str) -> Result:
    config = data.parent / "c.yaml"
    config.write_text(
        f"student: {{from_teacher: {{layers: 2}}}}\nteacher: {{model: {teacher}}}\ndata: {{train: {data}}}\n"
    )
    return CliRunner().invoke(app, ["data", str(config), *arguments], prog_name="kd-plugin")


def test_the_marked_text_is_what_the_assistant_says(teacher: Path, tmp_path: Path) -> None:
    chats = [[(f"ask {a}", f"so {a} is {b}") for a in "abc"] for b in "defghij"]
    turns = [[{"from": "human", "value": ask}, {"from": "gpt", "value": say}] for chat in chats for ask, say in chat]
    rows = [{"conversations": [turn for pair in turns[i : i + 3] for turn in pair]} for i in range(0, len(turns), 3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(teacher, tmp_path / "x.jsonl", "data.seq_len=100", "data.eval_fraction=0.1", "--rows", "2")
    assert done.exit_code == 0, done.output
    shown = re.findall(r"^sequence \d+ of \d+: 100 tokens, (\d+) trained on\n(.*)$", done.stdout, re.MULTILINE)
    assert len(shown) == 2
    spans = re.findall(r"\[\[(.*?)\]\]", shown[0][1])
    said = [f"{say}</s>" for chat in chats for _, say in chat]
    # A sequence ends anywhere, so the last span may be cut.
    assert len(spans) >= 2 and set(spans[:-1]) <= set(said) and any(text.startswith(spans[-1]) for text in said)
    assert "[[" not in "".join(re.findall(r"user, (.*?)</s>", shown[0][1]))
    assert int(shown[0][0]) == sum(len(span.replace("</s>", "$")) for span in spans)


def test_what_is_left_out_is_said_with_its_place_and_why(teacher: Path, tmp_path: Path) -> None:
    rows = [
        *({"text": f"text {letter}"} for letter in "abcdef"),
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(teacher, path, "data.seq_len=8", "data.eval_fraction=0.2", "--rows", "0")
    assert done.exit_code == 0, done.output
    assert (
        "warning: data.train: 1 record(s) without a token to train on were left out: 1 x no turn of the " in done.stdout
    )
    assert f"roles found: user (first: {path}:7)" in done.stdout
    assert f"1 turn(s) of the assistant are empty (first: {path}:8, turn 2)" in done.stdout
    assert "6 x text, 2 x messages in" in done.stdout and "sequence 1" not in done.stdout
    table = {line[:36].strip(): line.split()[-2:] for line in done.stdout.splitlines()[:9]}
    documents = [int(number) for number in table["documents"]]
    assert sum(documents) == 7 and documents[1] == 1
    assert "longer than data.seq_len, 8" in done.stdout


def test_faults_are_one_line_and_exit_with_2(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,other\na,1\nb\n")
    done = run(teacher, path)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}:3: 1 cell(s), and the first line has 2 columns")
    missing = run(teacher, tmp_path / "y.csv")
    assert missing.exit_code == 2 and "data.train: no such file or directory" in missing.stderr
    assert run(teacher, path, "data.train_on=first").exit_code == 2


def test_pieces_keep_the_spaces_that_a_tokenizer_drops_at_the_start() -> None:
    words = ["a", " b", " c", " d", " e"]

    def decode(ids: list[int]) -> str:
        return "".join(words[index] for index in ids).lstrip()

    trained = np.array([False, True, True, False, True])
    assert marked(np.arange(5), trained, decode) == [("a", False), (" b c", True), (" d", False), (" e", True)]


def test_with_the_soft_loss_on_all_tokens_it_says_how_many_those_are(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {a}", "completion": "so"} for a in "abcdef"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(teacher, tmp_path / "x.jsonl", "data.seq_len=20", "distill.soft_on=all", "--rows", "1")
    assert done.exit_code == 0, done.output
    # Two documents of five, two and one token, the last of which ends it; nothing predicts the first of each.
    assert "sequence 1 of 3: 20 tokens, 6 trained on, 14 in the soft loss" in done.stdout
