"""Columns and keys that change what a model reads, or what it is trained on: rendered or refused, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data.documents import DataError
from tests.chat_data import (
    ANSWERED,
    CHAT,
    CHAT_OF_ONE,
    CONVERSATION,
    FULL,
    MARKED_CHAT,
    TOOLS,
    documents,
    make_tokenizer,
    read,
    refusal,
    rendered,
    shown,
    write_jsonl,
)

# Rendered


def test_tools_documents_and_settings_reach_the_prompt(tmp_path: Path) -> None:
    tools = json.dumps(TOOLS).split()
    unknown = " ".join("<unk>" for _ in tools)
    row = {"messages": CHAT_OF_ONE, "tools": TOOLS, "documents": [{"text": "e"}]}
    assert rendered(tmp_path, row) == f"a g {unknown} b e {ANSWERED}"
    assert rendered(tmp_path, {**row, "tools": json.dumps(TOOLS)}) == f"a g {unknown} b e {ANSWERED}"
    row = {"messages": CHAT_OF_ONE, "chat_template_kwargs": {"thoughtful": False, "thing": None}}
    assert rendered(tmp_path, row) == f"no {ANSWERED}"
    row["chat_template_kwargs"] = {"thoughtful": True}  # says what the template does anyway
    assert rendered(tmp_path, row) == ANSWERED


@pytest.mark.parametrize("template", [FULL, FULL.replace("{{ message.content + ' <eos> ' }}", (
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message.content + ' <eos> ' }}{% endif %}"))])  # fmt: skip
def test_what_is_trained_on_does_not_depend_on_what_stands_before_it(tmp_path: Path, template: str) -> None:
    row = {"messages": CONVERSATION, "documents": [{"text": "e"}], "chat_template_kwargs": {"thoughtful": False}}
    assert rendered(tmp_path, row, template) == (
        "b e no user : hi <eos> assistant : YES <EOS> user : why <eos> assistant : BECAUSE A <EOS>"
    )


def test_the_prompt_is_the_library_s_own(tmp_path: Path) -> None:
    tokenizer = make_tokenizer({"default": CHAT, "tool_use": FULL})  # as Command R and Hermes have it
    settings = {"thoughtful": False}
    source = write_jsonl(
        tmp_path / "x.jsonl",
        {"messages": CHAT_OF_ONE, "tools": TOOLS, "chat_template_kwargs": settings},
        {"messages": CHAT_OF_ONE},
    )
    wanted = [
        tokenizer.apply_chat_template(CHAT_OF_ONE, tools=TOOLS, tokenize=False, **settings),
        tokenizer.apply_chat_template(CHAT_OF_ONE, tokenize=False),
    ]
    wanted_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wanted]
    assert [document.input_ids.tolist() for document in read(source, tokenizer)] == wanted_ids
    assert wanted_ids[0] != wanted_ids[1]


def test_a_call_of_a_tool_is_an_answer(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}
    result = {"role": "tool", "content": "c"}
    row = {"messages": [CONVERSATION[0], call, result, CONVERSATION[1]]}
    assert rendered(tmp_path, row) == "user : hi <eos> assistant : D G <EOS> <unk> : c <eos> assistant : YES <EOS>"


def test_turns_of_weight_0_are_read_and_not_trained_on(tmp_path: Path) -> None:
    for template in (CHAT, MARKED_CHAT):
        for key, value in (("weight", 0), ("train", False), ("training", False)):
            turns = [CONVERSATION[0], {**CONVERSATION[1], key: value}, *CONVERSATION[2:]]
            assert rendered(tmp_path, {"messages": turns}, template) == (
                "user : hi <eos> assistant : yes <eos> user : why <eos> assistant : BECAUSE A <EOS>"
            )
        last = {"messages": [*CONVERSATION[:3], {**CONVERSATION[3], "weight": 0.0}]}
        assert rendered(tmp_path, last, template) == (
            "user : hi <eos> assistant : YES <EOS> user : why <eos> assistant : because a <eos>"
        )


def test_parts_that_are_all_text_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "be"}, {"text": "cause"}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": parts},
        ]
    }
    assert rendered(tmp_path, row) == "user : hi <eos> assistant : BECAUSE <EOS>"


def test_columns_that_mean_nothing_to_a_model_are_left_alone(tmp_path: Path) -> None:
    other = {"id": 3, "source": "web", "tools": [], "documents": None, "images": [], "chat_template_kwargs": {}}
    assert (
        rendered(tmp_path, {"messages": CHAT_OF_ONE, **other, "prompt": "why", "weight": 1, "label": True}) == ANSWERED
    )
    assert rendered(tmp_path, {"text": "a", **other, "functions": ["f"], "system": "b"}) == "A <EOS>"
    row = {"prompt": "a b ", "completion": "c", "instruction": "a", "input": " b\n", "context": "", "label": 1, **other}
    assert rendered(tmp_path, row) == "a b C <EOS>"
    turns = [{"role": "system", "content": "a b"}, *CHAT_OF_ONE]
    assert rendered(tmp_path, {"messages": turns, "system": "a b"}).startswith("system : a b <eos> user")
    nulls = [{**turn, "name": "x", "tool_calls": None, "weight": None} for turn in CHAT_OF_ONE]
    assert rendered(tmp_path, {"messages": nulls}) == ANSWERED


def test_beside_a_text_column_that_was_named_nothing_counts(tmp_path: Path) -> None:
    row = {"body": "a", "tools": TOOLS, "messages": CHAT_OF_ONE}
    assert [shown(d) for d in documents(tmp_path, row, text_column="body")] == ["A <EOS>"]


# Refused


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"functions": [{"name": "g"}]}, ": 'functions' changes .*: rename it 'tools'"),
        ({"images": ["a.png"]}, ": 'images' changes .* the models read text only"),
        ({"system": "be brief"}, ": the text of 'system' is not in the prompt: write it into the first turn"),
        ({"assistant_masks": [0, 1]}, ": 'assistant_masks' changes .*: what is trained on follows"),
        ({"response_format": {"type": "json"}}, ": 'response_format' changes"),
        ({"weight": 0.5}, ": 'weight' is 0.5, and all rows weigh the same"),
        ({"label": False}, ": 'label' is false, which marks an undesired answer"),
        ({"tools": "[{"}, ": 'tools' is text and no JSON"),
        ({"tools": ["g"]}, ": 'tools' is text and no JSON"),
        ({"tools": {"g": 1}}, ": 'tools' has to be a list of objects, found"),
        ({"documents": [3]}, ": 'documents' has to be a list of objects, found"),
        ({"chat_template_kwargs": [3]}, ": 'chat_template_kwargs' has to be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, r": chat_template_kwargs\.tokenize is no setting of a template"),
        ({"chat_template_kwargs": {"depth": 3}}, ": the chat template knows no 'depth', which"),
    ],
)
def test_what_would_change_a_conversation_is_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    good = {"messages": CHAT_OF_ONE}
    assert refusal(tmp_path, good, {**good, **other})
    with pytest.raises(DataError, match=r"x\.jsonl:2" + said):
        documents(tmp_path, good, {**good, **other})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        *(({"prompt": "a", "completion": "b", name: [{"text": "c"}]}, f": {name!r} changes .* through a chat template")
          for name in ("tools", "documents")),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"c": 1}}, ": 'chat_template_kwargs' changes"),
        ({"prompt": "a", "completion": "b", "documents": ["c"]}, ": 'documents' changes"),
        ({"prompt": "a", "completion": "b", "context": "c"}, ": the text of 'context' is not in the prompt"),
        ({"prompt": "a", "completion": "b", "system": "c"}, ": the text of 'system' is not in the prompt"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, ": 'history' changes"),
        ({"prompt": "a", "completion": "b", "labels": [-100, 2]}, ": 'labels' changes"),
        ({"prompt": "a", "completion": "b", "label": False}, ": 'label' is false"),
        ({"text": "a", "tools": TOOLS}, ": 'tools' changes .* or remove it if the text has it already"),
        ({"text": "a", "tools": json.dumps(TOOLS)}, ": 'tools' changes"),
        ({"text": "a \ud800"}, r": 'text' holds \\ud800 at character 2, half of a character"),
    ],
)  # fmt: skip
def test_what_would_change_a_prompt_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert refusal(tmp_path, row)
    with pytest.raises(DataError, match=said):
        documents(tmp_path, row)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"weight": 0.5}, ", turn 2: 'weight' is 0.5, wanted 0 or 1"),
        ({"train_detail": [{"begin_offset": 0}]}, ", turn 2: 'train_detail' trains on parts of a turn"),
        ({"images": ["a.png"]}, ", turn 2: 'images' changes what a turn means"),
        ({"content": None}, ", turn 2: has no 'content'; found role: write '' for nothing"),
        ({"content": {"a": 1}}, ", turn 2: 'content' holds dict"),
        ({"content": []}, ", turn 2: 'content' holds list"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            "a part of type 'image_url'",
        ),
        ({"content": "a \udfff"}, r", turn 2: 'content' holds \\udfff"),
        ({"reasoning_content": "why"}, ", turn 2: the chat template knows no 'reasoning_content' and would drop it"),
        ({"function_call": {"name": "g"}}, ", turn 2: the chat template knows no 'function_call'"),
    ],
)
def test_what_would_change_a_turn_is_refused(tmp_path: Path, turn: dict[str, Any], said: str) -> None:
    row = {"messages": [CHAT_OF_ONE[0], {**CHAT_OF_ONE[1], **turn}]}
    assert refusal(tmp_path, row).startswith(", turn 2: ")
    with pytest.raises(DataError, match=said):
        documents(tmp_path, row)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_a_template_that_drops_what_it_is_given_is_refused(tmp_path: Path, name: str) -> None:
    row = {"messages": CHAT_OF_ONE, name: [{"text": "a"}]}
    for template in (CHAT, MARKED_CHAT):
        assert f"the chat template drops {name!r}" in refusal(tmp_path, row, template=template)
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g"}}]}
    said = refusal(tmp_path, {"messages": [CHAT_OF_ONE[0], calls]}, template=CHAT)
    assert said.startswith(", turn 2: the chat template knows no 'tool_calls' and would drop it")


def test_whatever_a_template_raises_is_one_line_with_the_row(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"messages": CHAT_OF_ONE}, template="{{ messages[0].role + 3 }}")
    assert said.startswith(": the chat template refuses the conversation: TypeError: can only concatenate str")


def test_roles_of_other_formats_are_named(tmp_path: Path) -> None:
    turns = [{"role": "person", "content": "hi"}, {"role": "chatgpt", "content": "yes"}]
    said = refusal(tmp_path, {"messages": turns})
    assert said == (
        ": no turn is of role 'assistant', whose turns are trained on; found chatgpt, person: "
        "rename the roles user and assistant (human and gpt are read as these)"
    )


# Parquet, which has one type per column


def test_parquet_rows_say_what_jsonl_rows_say(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    call = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": {"name": "g"}}]}]
    rows = [
        {"messages": CHAT_OF_ONE, "tools": TOOLS, "id": 1},
        {"messages": CHAT_OF_ONE, "documents": [{"text": "e", "title": "f"}], "id": 2},
        {"messages": CHAT_OF_ONE, "documents": [{"text": "e"}], "chat_template_kwargs": {"thoughtful": False}},
        {"messages": CHAT_OF_ONE, "chat_template_kwargs": {"other": 3}},
        {"messages": call},
    ]
    names = sorted({name for row in rows for name in row})
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    assert table["messages"][0].as_py()[1]["tool_calls"] is None  # what the format makes of an absent key
    parquet.write_table(table.slice(0, 3), tmp_path / "x.parquet")
    lines = write_jsonl(tmp_path / "y.jsonl", *rows[:3])
    tokenizer = make_tokenizer(FULL.replace("| tojson", "[0].function.parameters.keys() | join(' ')"))
    found = [shown(d) for d in read(tmp_path / "x.parquet", tokenizer)]
    assert found[1:] == [shown(d) for d in read(lines, tokenizer)][1:] == [f"b e {ANSWERED}", f"b e no {ANSWERED}"]
    assert found[0] == f"a g <unk> {ANSWERED}"  # a null value in a structure is no key there, and cannot be told
    parquet.write_table(table.slice(4), tmp_path / "x.parquet")
    assert shown(read(tmp_path / "x.parquet", tokenizer)[0]) == "user : hi <eos> assistant : D G <EOS>"
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 4: the chat template knows no 'other'"):
        read(tmp_path / "x.parquet", tokenizer)
    parquet.write_table(pyarrow.table({"text": ["a"], "tools": [TOOLS]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 1: 'tools' changes"):
        read(tmp_path / "x.parquet")


def test_a_map_in_a_parquet_file_is_an_object(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    kind = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    tools = pyarrow.array([[[("name", "g"), ("c", "d")]]], type=kind)
    parquet.write_table(pyarrow.table({"messages": [CHAT_OF_ONE], "tools": tools}), tmp_path / "x.parquet")
    tokenizer = make_tokenizer("{% for tool in tools %}{{ tool.name + ' ' + tool.c + ' ' }}{% endfor %}" + CHAT)
    assert shown(read(tmp_path / "x.parquet", tokenizer)[0]) == f"g d {ANSWERED}"
