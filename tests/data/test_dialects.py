"""Rows of other formats: what the assistant says in them is what is trained on, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data.documents import DataError
from tests.chat_data import (
    ANSWERED,
    CHAT,
    CONVERSATION,
    MARKED_CHAT,
    documents,
    make_tokenizer,
    read,
    refusal,
    rendered,
    shown,
    write_jsonl,
)
from tests.refusals import refused

pytest.importorskip("transformers")

BOTH = "user : hi <eos> assistant : YES <EOS> user : why <eos> assistant : BECAUSE A <EOS>"
LAST = "user : hi <eos> assistant : yes <eos> user : why <eos> assistant : BECAUSE A <EOS>"
SHARE_GPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yes"},
    {"from": "human", "value": "why"},
    {"from": "gpt", "value": "because a"},
]


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARE_GPT, "id": "x_0"},
        {"conversations": CONVERSATION},
        {"messages": [{"role": turn["from"], "content": turn["value"]} for turn in SHARE_GPT]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CONVERSATION]},
    ],
)
def test_every_form_of_a_conversation_is_trained_on_alike(tmp_path: Path, row: dict[str, Any], template: str) -> None:
    assert rendered(tmp_path, row, template) == BOTH


def test_system_beside_a_share_gpt_conversation_is_its_first_turn(tmp_path: Path) -> None:
    assert rendered(tmp_path, {"conversations": SHARE_GPT, "system": "a b"}) == f"system : a b <eos> {BOTH}"
    own = [{"from": "system", "value": "a b"}, *SHARE_GPT]
    assert rendered(tmp_path, {"conversations": own, "system": "a b"}) == f"system : a b <eos> {BOTH}"
    said = refusal(tmp_path, {"conversations": own, "system": "g"})
    assert said.startswith(": the text of 'system' is not in the prompt")


def test_turns_of_share_gpt_may_be_left_untrained(tmp_path: Path) -> None:
    turns = [SHARE_GPT[0], {**SHARE_GPT[1], "weight": 0}, *SHARE_GPT[2:]]
    assert rendered(tmp_path, {"conversations": turns}) == LAST


def test_only_the_output_of_alpaca_is_trained_on(tmp_path: Path) -> None:
    row = {"instruction": "hi a", "input": "b c", "output": "yes", "text": "d"}
    assert rendered(tmp_path, row) == "user : hi a b c <eos> assistant : YES <EOS>"
    assert rendered(tmp_path, {**row, "input": ""}) == "user : hi a <eos> assistant : YES <EOS>"
    said = rendered(tmp_path, {**row, "input": None, "system": "g"})
    assert said == "system : g <eos> user : hi a <eos> assistant : YES <EOS>"
    assert refusal(tmp_path, {**row, "history": [["a", "b"]]}).startswith(": 'history' changes what a row means")
    assert refusal(tmp_path, {**row, "output": 3}) == ": 'output' is of type int, wanted text"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_of_prompt_and_completion_made_of_turns_the_completion_is_trained_on(tmp_path: Path, template: str) -> None:
    row = {"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}
    assert rendered(tmp_path, row, template) == LAST
    said = refusal(tmp_path, {"prompt": CONVERSATION[:3], "completion": "yes"})
    assert said == ": 'prompt' is a list of turns and 'completion' is not: make both the same"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_train_on_last_trains_on_the_last_answer(tmp_path: Path, template: str) -> None:
    [document] = documents(tmp_path, {"messages": CONVERSATION}, template=template, train_on="last")
    assert shown(document) == LAST
    # Its turn, and not the last one that is trained on.
    turns = [*CONVERSATION[:3], {**CONVERSATION[3], "weight": 0}]
    with pytest.raises(DataError, match="1 x no turn of the assistant that is to be trained on"):
        documents(tmp_path, {"messages": turns}, template=template, train_on="last")


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    turns = [{"speaker": turn["from"], "utterance": turn["value"]} for turn in SHARE_GPT]
    names = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    [document] = documents(tmp_path, {"dialog": turns, "text": "d"}, columns=names)
    assert shown(document) == BOTH
    names = {"prompt": "question", "completion": "answer"}
    [document] = documents(tmp_path, {"question": "a b ", "answer": "c", "prompt": "d"}, columns=names)
    assert shown(document) == "a b C <EOS>"


def test_names_that_no_row_has_are_refused(tmp_path: Path) -> None:
    row = {"instruction": "hi", "output": "yes", "persona": "a"}
    [document] = documents(tmp_path, row, columns={"system": "persona"})
    assert shown(document) == f"system : a <eos> {ANSWERED}"
    for columns in ({"system": "perzona"}, {"role": "perzona"}):
        refused(lambda columns=columns: documents(tmp_path, row, columns=columns), "data.columns: perzona: in no row")
    refused(lambda: documents(tmp_path, row, text_column="a", columns={"text": "b"}), "both name the column")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": "hi"}, ": 'conversations' has to be a list of {from, value} or {role, content}, found 'hi'"),
        ({"conversations": [{"user": "hi"}]}, ", turn 1: wanted {from, value} or {role, content}, found"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "yes"}]}, ", turn 1: has no 'content'"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "bing", "value": "yes"}]}, ": no turn is of"),
    ],
)
def test_turns_that_are_none_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    good = {"conversations": SHARE_GPT}
    assert refusal(tmp_path, good, row).startswith(said)


def test_a_template_that_wants_parts_gets_parts(tmp_path: Path) -> None:
    parts = (
        "{% for message in messages %}{{ message.role + ' : ' }}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    assert rendered(tmp_path, {"messages": CONVERSATION}, parts) == BOTH
    turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CONVERSATION]
    assert rendered(tmp_path, {"messages": turns}, parts) == BOTH


def test_empty_answers_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = [CONVERSATION[0], {"role": "assistant", "content": " "}]
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": CONVERSATION}, {"messages": empty}, {"messages": empty})
    assert shown(read(source, make_tokenizer(CHAT))[1]) == "user : hi <eos> assistant : <EOS>"
    assert f"2 turn(s) of the assistant are empty (first: {source}:2, turn 2)" in caplog.text
    caplog.clear()
    untrained = [CONVERSATION[0], {**empty[1], "weight": 0}, *CONVERSATION[2:]]
    read(write_jsonl(tmp_path / "y.jsonl", {"messages": untrained}), make_tokenizer(CHAT))
    assert "are empty" not in caplog.text


def test_rows_without_an_answer_are_counted_with_their_roles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unanswered = [{"role": "system", "content": "a"}, CONVERSATION[0]]
    rows = [{"messages": turns} for turns in (unanswered, CONVERSATION, unanswered, CONVERSATION[1:3])]
    source = write_jsonl(tmp_path / "x.jsonl", *rows)
    assert [shown(document) for document in read(source, make_tokenizer(CHAT))] == [BOTH]
    assert (
        "3 record(s) without a token to train on were left out: 2 x no turn of the assistant, roles found: system, "
        f"user (first: {source}:1); 1 x nothing but an opening line of the assistant (first: {source}:4)"
    ) in caplog.text
