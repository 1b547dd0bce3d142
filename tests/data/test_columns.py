"""Columns and keys that change what a model reads, or what it is trained on: rendered or refused, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data import chat_template, conversations
from kd_plugin.data.documents import DataError
from kd_plugin.data.packing import Document
from tests.chat_data import CHAT, CONVERSATION, MARKED_CHAT, make_tokenizer, read, shown, write_jsonl

TOOLS = [{"type": "function", "function": {"name": "g", "parameters": {"c": None, "enum": ["a", None]}}}]
FULL = (
    "{% if tools %}{{ 'a ' + tools[0].function.name + ' ' + tools | tojson + ' ' }}{% endif %}"
    "{% if documents %}{{ 'b ' + documents[0].text + ' ' }}{% endif %}"
    "{% if thoughtful is defined and not thoughtful %}{{ 'no ' }}{% endif %}"
    "{% for message in messages %}{{ message.role + ' : ' }}"
    "{% if message.tool_calls %}{{ 'd ' + message.tool_calls[0].function.name + ' <eos> ' }}"
    "{% else %}{{ message.content + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
CHAT_OF_ONE = CONVERSATION[:2]
ANSWERED = "user : hi <eos> assistant : YES <EOS>"


def documents(tmp_path: Path, *rows: Any, template: str | None = FULL, **values: Any) -> list[Document]:
    return read(write_jsonl(tmp_path / "x.jsonl", *rows), make_tokenizer(template), **values)


def rendered(tmp_path: Path, row: dict[str, Any], template: str = FULL) -> str:
    return shown(documents(tmp_path, row, template=template)[0])


def refusal(tmp_path: Path, *rows: Any, **values: Any) -> str:
    """What is said, after the place of the last row."""
    with pytest.raises(DataError) as caught:
        documents(tmp_path, *rows, **values)
    place, said = f"{tmp_path}/x.jsonl:{len(rows)}", str(caught.value)
    assert said.startswith(place) and "\n" not in said
    return said.removeprefix(place)


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
    turns = [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "yes"}]
    said = refusal(tmp_path, {"messages": turns})
    assert said == (
        ": no turn is of role 'assistant', whose turns are trained on; found gpt, human: "
        "rename the roles user and assistant"
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


# Turns that the template does not render


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


@pytest.mark.parametrize("role", ["model", "gpt", "bot"])
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


# Columns that only the template knows

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
