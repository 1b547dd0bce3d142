"""The tokenised cache: the same documents as without it, made once, and anew as soon as anything of theirs changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kd_plugin.data import documents as documents_module
from kd_plugin.data.documents import DataError, load_documents
from kd_plugin.data.packing import Document
from kd_plugin.data.record import Record
from kd_plugin.settings.run import DataConfig
from tests.chat_data import CHAT, CONVERSATION, make_tokenizer, read, write_jsonl
from tests.refusals import refused

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

ROWS = [{"text": "a b"}, {"text": ""}, {"messages": CONVERSATION}, {"prompt": "a ", "completion": "b c"}]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the records that were tokenised."""
    places: list[str] = []
    original = documents_module.encode

    def encode(records: Iterable[Record], *given: Any) -> Iterator[Document | str | None]:
        return original((places.append(record.where) or record for record in records), *given)

    monkeypatch.setattr(documents_module, "encode", encode)
    return places


def same(ones: Sequence[Document], others: Sequence[Document]) -> bool:
    return len(ones) == len(others) and all(
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.trained, other.trained)
        and (one.input_ids.dtype, one.trained.dtype) == (other.input_ids.dtype, other.trained.dtype)
        and one.where == other.where
        for one, other in zip(ones, others, strict=True)
    )


def test_the_second_start_reads_what_the_first_made(
    tmp_path: Path, tokenised: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [*ROWS, *({"text": f"{a} {b}"} for a in "abcdefg" for b in "abcdefg" for _ in range(50))]
    source, cache = write_jsonl(tmp_path / "x.jsonl", *rows), str(tmp_path / "cache")
    plain = read(source, make_tokenizer(CHAT), cache=None)
    number = len(tokenised)
    assert number == 2 * len(rows)  # for training and evaluation
    first = read(source, make_tokenizer(CHAT), cache=cache)
    assert len(tokenised) == number + len(rows)  # the same file, once
    said = [line for line in caplog.messages if "left out" in line]
    caplog.clear()
    second = read(source, make_tokenizer(CHAT), cache=cache)
    assert len(tokenised) == number + len(rows)
    assert same(first, plain) and same(second, plain)
    assert [line for line in caplog.messages if "left out" in line] == said[:2]
    assert not second[0].input_ids.flags.owndata  # mapped
    [file] = (tmp_path / "cache").glob("*/documents.arrow")
    assert datasets.Dataset.from_file(str(file))[2]["input_ids"] == plain[2].input_ids.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda source, values: Path(source).write_text('{"text": "a c"}\n'),
        lambda source, values: values.update(tokenizer=make_tokenizer(CHAT + " ")),
        lambda source, values: values.update(tokenizer=make_tokenizer(CHAT, bos=True)),
        lambda source, values: values.update(tokenizer=make_tokenizer(CHAT, eos=False)),
        lambda source, values: values.update(train_on="last"),
        lambda source, values: values.update(max_documents=1),
        lambda source, values: values.update(columns={"text": "text"}),
    ],
)
def test_whatever_changes_the_tokens_makes_them_anew(tmp_path: Path, tokenised: list[str], change: Any) -> None:
    source, cache = write_jsonl(tmp_path / "x.jsonl", {"text": "a b"}), str(tmp_path / "cache")
    values: dict[str, Any] = {"tokenizer": make_tokenizer(CHAT)}
    read(source, cache=cache, **values)
    os.utime(source, (0, 0))  # which changes nothing
    read(source, cache=cache, **values)
    assert len(tokenised) == 1
    before = Path(source).stat()
    change(source, values)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = read(source, cache=cache, **values)
    assert len(tokenised) == 2 and same(changed, read(source, **{**values, "cache": None}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def rewrite(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


@pytest.mark.parametrize("name", ["documents.arrow", "index.npy", "about.json"])
@pytest.mark.parametrize("damage", [cut, rewrite, Path.unlink])
def test_a_damaged_cache_is_made_anew_with_one_warning(
    tmp_path: Path, tokenised: list[str], caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    source, cache = write_jsonl(tmp_path / "x.jsonl", {"text": "a b"}), tmp_path / "cache"
    first = [document._replace(input_ids=document.input_ids.copy()) for document in read(source, cache=str(cache))]
    first = [document._replace(trained=document.trained.copy()) for document in first]
    [file] = cache.glob(f"*/{name}")
    damage(file)
    assert same(read(source, cache=str(cache)), first)
    assert len(tokenised) == 2 and caplog.text.count("is damaged") == 1
    assert same(read(source, cache=str(cache)), first) and len(tokenised) == 2


def test_a_text_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": 3}), tmp_path / "cache"
    refused(lambda: read(source, cache=str(cache)), f"{source}:2: 'text' is of type int")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "a b"})
    (tmp_path / "file").write_text("")
    assert len(read(source, cache=str(tmp_path / "file" / "cache"))) == 1
    assert "so every process tokenises data.train" in caplog.text


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "a b"})
    monkeypatch.setenv("KD_PLUGIN_CACHE", str(tmp_path / "own"))
    read(source)
    assert len(list((tmp_path / "own" / "tokenized").glob("*/about.json"))) == 1
    monkeypatch.delenv("KD_PLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    read(source)
    assert len(list((tmp_path / "xdg" / "kd_plugin" / "tokenized").glob("*/about.json"))) == 1


def test_datasets_are_cached_by_their_fingerprint_and_streams_of_no_known_commit_are_not(
    tmp_path: Path, tokenised: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "b"]

    def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
        return datasets.Dataset.from_dict({"text": texts})

    def load_dataset_builder(name: str, subset: str | None) -> Any:
        made = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return SimpleNamespace(hash=None, config_id="default", as_streaming_dataset=lambda split: made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    config = DataConfig(train="some/texts", eval_split="train", cache=str(tmp_path / "cache"))
    load_documents(config, make_tokenizer())
    assert len(tokenised) == 2  # one split under two names
    texts.append("c")
    load_documents(config, make_tokenizer())
    assert len(tokenised) == 2 + 3
    load_documents(config.model_copy(update={"max_documents": 2}), make_tokenizer())
    assert len(tokenised) == 2 + 3 + 4


def test_the_content_of_about_json_is_what_was_counted(tmp_path: Path) -> None:
    source, cache = write_jsonl(tmp_path / "x.jsonl", *ROWS), tmp_path / "cache"
    read(source, make_tokenizer(CHAT), cache=str(cache))
    [file] = cache.glob("*/about.json")
    tally = json.loads(file.read_text())["tally"]
    assert tally["forms"] == {"text": 2, "messages": 1, "prompt + completion": 1}
    assert tally["left_out"] == {"no text": [1, f"{source}:2"]}
    with pytest.raises(DataError, match="has no text to train on \\(1 records read: 1 x no text"):
        read(write_jsonl(tmp_path / "y.jsonl", {"text": ""}), cache=str(cache))
