"""What a chat template drops of its turns, or reads of other columns: never dropped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data import chat_template, conversations
from kd_plugin.data.documents import DataError
from tests.chat_data import (
    ANSWERED,
    CHAT_OF_ONE,
    CONVERSATION,
    FULL,
    MARKED_CHAT,
    documents,
    make_tokenizer,
    read,
    refusal,
    rendered,
)


def without(role: str) -> str:
    return FULL.replace("for message in messages %}", f"for message in messages if message.role != '{role}' %}}")


@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_a_turn_that_the_template_drops_whole_is_refused(tmp_path: Path, role: str) -> None:
    turns = [{"role": "system", "content": "why"}, *CHAT_OF_ONE[:1], {"role": "tool", "content": "a"}, CHAT_OF_ONE[1]]
    number = 1 + [turn["role"] for turn in turns].index(role)
    assert refusal(tmp_path, {"messages": turns}, template=without(role)) == (
        f", turn {number}: the chat template drops the whole turn, of role {role!r}: use a tokenizer whose template "
        "renders it, or leave such rows out"
    )


def test_a_dropped_turn_is_seen_though_its_words_stand_elsewhere(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "hi"}, *CHAT_OF_ONE, *CONVERSATION[2:]]
    assert ", turn 3: " not in refusal(tmp_path, {"messages": turns}, template=without("system"))


def test_turns_that_a_template_rewrites_are_not_dropped(tmp_path: Path) -> None:
    upper = FULL.replace("message.content + ' <eos> '", "(message.content | upper) + ' <eos> '")
    assert rendered(tmp_path, {"messages": CHAT_OF_ONE}, upper).startswith("user : <unk> <eos>")
    turns = [{"role": "system", "content": ""}, *CHAT_OF_ONE]
    assert rendered(tmp_path, {"messages": turns}).endswith(ANSWERED)


@pytest.mark.parametrize("role", ["model", "chatgpt", "bot"])
def test_the_assistant_under_two_names_is_refused(tmp_path: Path, role: str) -> None:
    turns = [*CHAT_OF_ONE, CHAT_OF_ONE[0], {"role": role, "content": "a"}]
    assert refusal(tmp_path, {"messages": turns}).startswith(f": turns of role {role} would not be trained on")


def test_a_refusal_beside_an_empty_answer_is_refused(tmp_path: Path) -> None:
    for content in (None, ""):
        turns = [CHAT_OF_ONE[0], {"role": "assistant", "content": content, "refusal": "no"}]
        said = refusal(tmp_path, {"messages": turns})
        assert (
            said
            == ", turn 2: 'refusal' changes what a turn means and cannot be heeded: write it as the turn's 'content'"
        )
    row = {"messages": [CHAT_OF_ONE[0], {**CHAT_OF_ONE[1], "refusal": None}]}
    assert rendered(tmp_path, row) == ANSWERED


def test_a_key_of_turns_that_does_not_reach_the_text_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "_looked_at", set())
    named = [{**CHAT_OF_ONE[0], "name": "bob"}, CHAT_OF_ONE[1]]
    documents(tmp_path, {"messages": named}, {"messages": named})
    assert caplog.text.count("turn 1: the chat template does not render 'name', so the models do not read it") == 1
    caplog.clear()
    naming = FULL.replace("message.role + ' : '", "message.role + (' ' + message.name if message.name else '') + ' : '")
    assert "<unk>" in rendered(tmp_path, {"messages": named}, naming)
    assert not [record for record in caplog.records if record.name == "kd_plugin.data.conversations"]


ASKING = (
    "{% if not enable_thinking is defined or enable_thinking %}{{ 'c ' }}{% endif %}"
    "{{ date_string | default('d') + ' ' }}" + FULL
)


@pytest.mark.parametrize("value", [False, True, 0])
def test_enable_thinking_as_a_column_is_refused_whatever_it_says(tmp_path: Path, value: Any) -> None:
    for template in (FULL, ASKING):
        said = refusal(tmp_path, {"messages": CHAT_OF_ONE, "enable_thinking": value}, template=template)
        assert said.startswith(": 'enable_thinking' changes what a row means") and "chat_template_kwargs" in said


@pytest.mark.parametrize("value", ["g", "", False, 0])
def test_a_column_that_the_template_reads_is_refused(tmp_path: Path, value: Any) -> None:
    row = {"messages": CHAT_OF_ONE, "date_string": value, "content": "other", "id": 7}
    assert refusal(tmp_path, row, template=ASKING) == (
        ": the chat template reads 'date_string', which the column of that name does not reach: write it into "
        "'chat_template_kwargs', or remove the column"
    )
    assert rendered(tmp_path, row) == ANSWERED  # of a template that reads no such thing
    row = {"messages": CHAT_OF_ONE, "date_string": None, "chat_template_kwargs": {"date_string": "g"}}
    assert rendered(tmp_path, row, ASKING).startswith("c g ")


def test_so_is_one_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"messages": [CHAT_OF_ONE], "date_string": ["g"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"row 1: the chat template reads 'date_string'"):
        read(tmp_path / "x.parquet", make_tokenizer(ASKING))


def test_marked_templates_and_broken_ones_are_looked_at_too() -> None:
    assert chat_template._variables(MARKED_CHAT) == {"messages"}
    assert chat_template._variables("{% for m in messages %}{% break %}{% endfor %}{{ x }}") == {"messages", "x"}
    assert chat_template._variables("{% if %}") == frozenset()
