"""Documents, packing and batches, with a tokenizer of words made here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data.documents import DataError, load_documents
from kd_plugin.settings.run import DataConfig
from tests.chat_data import CHAT, CONVERSATION, MARKED_CHAT, make_tokenizer, read, shown, write_jsonl

pytest.importorskip("transformers")

IGNORED = -100
# Shows the thoughts of the last turn only, as templates of reasoning models do.
FORGETFUL_CHAT = (
    "{% for message in messages %}{{ message.role + ' : ' }}"
    "{{ 'why ' if loop.last and message.role == 'assistant' else '' }}{{ message.content + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


# Sources


def test_text_file_is_one_document_with_an_end(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b\n\nc d\n")
    assert [shown(document) for document in read(tmp_path / "x.txt")] == ["A B C D <EOS>"]
    assert shown(read(tmp_path / "x.txt", make_tokenizer(bos=True))[0]) == "<BOS> A B C D <EOS>"


def test_end_is_not_doubled_and_its_absence_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.txt").write_text("a b <eos>")
    assert shown(read(tmp_path / "x.txt")[0]) == "A B <EOS>"
    (tmp_path / "x.txt").write_text("a b")
    assert shown(read(tmp_path / "x.txt", make_tokenizer(eos=False))[0]) == "A B"
    assert "no end token" in caplog.text


def test_directory_and_glob_read_files_in_order_of_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "deep" / "c.txt").write_text("c")
    (tmp_path / "notes.md").write_text("d")
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    assert [shown(d)[0] for d in read(tmp_path)] == ["A", "B", "C"]
    assert [shown(d)[0] for d in read(f"{tmp_path}/**/*.txt")] == ["B", "C"]
    monkeypatch.chdir(tmp_path)
    assert [shown(d)[0] for d in read("deep/*.txt")] == ["C"]


def test_python_docs_come_with_python() -> None:
    config = DataConfig()
    train, held_out = load_documents(config, make_tokenizer())
    from pydoc_data.topics import topics

    assert len(train) + len(held_out) == len(topics) and len(held_out) == round(len(topics) * 0.05)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": ["a", "b", ""], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert [shown(d) for d in read(tmp_path / "x.parquet")] == ["A <EOS>", "B <EOS>"]
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]]
    parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "y.parquet")
    assert shown(read(tmp_path / "y.parquet", make_tokenizer(CHAT))[0]).endswith("assistant : YES <EOS>")
    with pytest.raises(DataError, match=r"columns found: other, text; wanted 'body'"):
        read(tmp_path / "x.parquet", text_column="body")


def test_dataset_name_is_loaded_with_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
        calls.append((name, subset, split))
        return datasets.Dataset.from_dict({"text": ["a", "b", "c"] if split == "train" else ["d"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(train="some/texts", subset="small", eval_split="test")
    train, held_out = load_documents(config, make_tokenizer())
    assert [shown(d) for d in train] == ["A <EOS>", "B <EOS>", "C <EOS>"]
    assert [shown(d) for d in held_out] == ["D <EOS>"]
    assert calls == [("some/texts", "small", "train"), ("some/texts", "small", "test")]


def test_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("Dataset 'some/texts' doesn't exist\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^data\.train: no file 'some/texts' here, and .*doesn't exist$"):
        read("some/texts")


def test_form_found_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(write_jsonl(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}, {"text": "c"}))
    assert "data.train: 1 x prompt + completion, 1 x text in" in caplog.text


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": ""}, {"text": None})
    assert len(read(source)) == 1
    said = f"2 record(s) without a token to train on were left out: 2 x no text (first: {source}:2)"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            '{"body": "a"}',
            r"x\.jsonl:1: columns found: body; wanted 'text', 'prompt' and 'completion', 'messages', ",
        ),
        ('{"text": "a"}\n\n{"text": 3}', r"x\.jsonl:3: 'text' is of type int, wanted text"),
        ('{"text": "a"}\n{"text"', r"x\.jsonl:2: not a line of JSON"),
        ("[1]", r"x\.jsonl:1: a JSON list; each line has to be an object"),
        ('{"messages": "hi"}', r"x\.jsonl:1: 'messages' has to be a list of \{role, content\}, found 'hi'"),
        ("", "has no text to train on"),
        ('{"text": ""}', "has no text to train on"),
    ],
)
def test_bad_rows_are_errors_of_one_line_with_their_place(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "x.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "data.train: no such file or directory: no/such/file.txt"),
        ("missing.json", "data.train: no such file or directory: missing.json"),
        ("{tmp}/*.txt", r"no file that ends in one of \.txt, \.jsonl, .*\.parquet or .* in"),
        ("{tmp}/x.md", r"ends in '\.md'; give a file that ends in one of \.txt, \.jsonl, "),
        ("my_file.zst", r"no such file or directory: my_file\.zst \(and '\.zst' is not read: \.txt, "),
        ("{tmp}/x.parquet", "not a readable Parquet file"),
    ],
)
def test_missing_or_foreign_files_are_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "x.md").write_text("a,b")
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=message) as caught:
        read(source.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_undecodable_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"x\.txt: not UTF-8 text \(byte 3\)"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize("values", [{"subset": "x"}, {"split": "test"}, {"eval_split": "test"}])
def test_settings_of_datasets_are_refused_for_files(values: dict[str, str]) -> None:
    with pytest.raises(DataError, match=rf"data\.{next(iter(values))} is .* no dataset name; remove"):
        load_documents(DataConfig(**values), make_tokenizer())


# What is trained on


def test_only_the_completion_is_trained_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"prompt": "user : hi ", "completion": "yes no"})
    assert shown(read(source)[0]) == "user : hi YES NO <EOS>"
    assert shown(read(source, make_tokenizer(bos=True))[0]) == "<bos> user : hi YES NO <EOS>"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_only_the_assistant_s_turns_are_trained_on(tmp_path: Path, template: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": CONVERSATION})
    assert shown(read(source, make_tokenizer(template))[0]) == (
        "user : hi <eos> assistant : YES <EOS> user : why <eos> assistant : BECAUSE A <EOS>"
    )


def test_opening_line_of_the_assistant_is_not_trained_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": [CONVERSATION[1], *CONVERSATION[2:]]})
    document = read(source, make_tokenizer(CHAT))[0]
    assert shown(document) == "assistant : yes <eos> user : why <eos> assistant : BECAUSE A <EOS>"


def test_end_is_added_where_the_template_has_none_and_trained_after_an_answer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHAT.replace(" <eos> ", " "))
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": CONVERSATION[:2]}, {"messages": CONVERSATION[:3]})
    assert [shown(document) for document in read(source, tokenizer)] == [
        "user : hi assistant : YES <EOS>",
        "user : hi assistant : YES user : why <eos>",
    ]


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", {"messages": CONVERSATION[:2]})
    document = read(one, make_tokenizer(FORGETFUL_CHAT))[0]
    assert shown(document) == "user : hi <eos> assistant : WHY YES <EOS>"
    many = write_jsonl(tmp_path / "many.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"many\.jsonl:1: the chat template renders turn 2 differently"):
        read(many, make_tokenizer(FORGETFUL_CHAT))


def test_refusals_of_templates_are_passed_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": CONVERSATION})
    with pytest.raises(DataError, match=r"x\.jsonl:1: the chat template refuses the conversation: no systems"):
        read(source, make_tokenizer("{{ raise_exception('no systems') }}"))
    with pytest.raises(DataError, match="'messages' need a chat template, which this tokenizer lacks"):
        read(source, make_tokenizer())
