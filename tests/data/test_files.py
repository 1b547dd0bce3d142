"""Files of rows, whatever they are called: the same documents, and every bad row with its file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kd_plugin.data.documents import DataError, load_documents
from kd_plugin.settings.run import DataConfig
from tests.chat_data import CHAT, CONVERSATION, make_tokenizer, read, shown
from tests.refusals import refused

pytest.importorskip("transformers")

ROWS = [{"text": "a b"}, {"text": "c, d"}, {"text": 'e\n"f"'}]
WORDS = ["A B <EOS>", "<UNK> D <EOS>", "E <UNK> <EOS>"]
CSV = '\ufefftext,other\na b,1\n"c, d",2\n\n"e\n""f""",3\n'
FILES: dict[str, Callable[[], bytes]] = {
    "x.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "bom.jsonl": lambda: ("\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS)).encode(),
    "x.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "bom.json": lambda: ("\ufeff" + json.dumps(ROWS)).encode(),
    "lines.json": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "x.csv": CSV.encode,
    "x.tsv": CSV.replace("t,o", "t\to").replace(",1", "\t1").replace(",2", "\t2").replace(",3", "\t3").encode,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compressed", [False, True])
def test_all_files_of_rows_give_the_same_documents(tmp_path: Path, name: str, compressed: bool) -> None:
    content = FILES[name]()
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert [shown(document) for document in read(path)] == WORDS
    assert [shown(document) for document in read(tmp_path)] == WORDS


def test_the_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffa b".encode())
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress("\ufeffc".encode()))
    assert [shown(document) for document in read(tmp_path)] == ["A B <EOS>", "C <EOS>"]


def test_a_long_cell_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "a " * 100_000)  # csv's own limit is 131,072 characters
    assert len(read(tmp_path / "x.csv")[0].input_ids) == 100_001


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", b'text,other\na,1\n\n"b\nc",2\nd\n', ":6: 1 cell(s), and the first line has 2 columns"),
        ("x.csv", b'text,other\n"a\nb",1,2\n', ":2: 3 cell(s), and the first line has 2 columns"),
        ("x.csv", b"text\na\nb\xff\n", ":3: not UTF-8 text (byte 1)"),
        ("x.csv", b'text\na\n"b" c\n', ":3: not a row of a table"),
        ("x.csv", b"body\na\n", ":2: columns found: body; wanted 'text'"),
        ("x.json", b'[{"text": "a"},\n\n {"text": 3}]', ":3: 'text' is of type int, wanted text"),
        ("x.json", b'[{"text": "a"},\n {"text": "b"}\n {"text": "c"}]', ":3: not a list of JSON objects (no ','"),
        ("x.json", b'[{"text": "a"},\n {"text": ]', ":2: not a list of JSON objects (Expecting value"),
        ("x.json", b'[{"text": "a"}', ":1: not a list of JSON objects"),
        ("x.json", b'[{"text": "a"}] \n []', ":1: something follows the end of the JSON list"),
        ("x.json", b'[{"text": "a"},\n["b"]]', ":2: a JSON list; each item has to be an object"),
        ("x.json", b'{"data": [{"text": "a"}]}', ":1: columns found: data; wanted"),
        ("x.json", b'[{"text": "\xff"}]', ": not UTF-8 text (byte 11)"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": 3}'), ":2: 'text' is of type int"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], ": not a readable gzip file"),
        ("x.jsonl.gz", b'{"text": "a"}', ": not a readable gzip file"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(lambda: read(tmp_path / name), f"{tmp_path / name}{said}")


def test_parquet_reads_the_columns_of_every_form(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    turns = [[{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "yes", "weight": 1}]]
    parquet.write_table(pyarrow.table({"talk": turns, "system": ["a"], "id": [3]}), tmp_path / "x.parquet")
    [document] = read(tmp_path / "x.parquet", make_tokenizer(CHAT), columns={"conversations": "talk"})
    assert shown(document) == "system : a <eos> user : hi <eos> assistant : YES <EOS>"
    row = {"instruction": ["hi"], "input": ["a"], "output": ["yes"]}
    parquet.write_table(pyarrow.table(row), tmp_path / "y.parquet")
    assert shown(read(tmp_path / "y.parquet", make_tokenizer(CHAT))[0]) == "user : hi a <eos> assistant : YES <EOS>"
    row = {"prompt": [CONVERSATION[:1]], "completion": [CONVERSATION[1:2]]}
    parquet.write_table(pyarrow.table(row), tmp_path / "z.parquet")
    assert shown(read(tmp_path / "z.parquet", make_tokenizer(CHAT))[0]) == "user : hi <eos> assistant : YES <EOS>"


def test_folders_of_save_to_disk_are_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_dict({"text": list(texts)}) for texts in ("ab", "c"))
    train.save_to_disk(tmp_path / "one")
    assert [shown(document) for document in read(tmp_path / "one")] == ["A <EOS>", "B <EOS>"]
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    both = load_documents(DataConfig(train=str(tmp_path / "two"), eval_split="test"), make_tokenizer())
    assert [[shown(document) for document in part] for part in both] == [["A <EOS>", "B <EOS>"], ["C <EOS>"]]
    assert [shown(document) for document in read(tmp_path / "two", split="test")] == ["C <EOS>"]
    refused(lambda: read(tmp_path / "two", split="dev"), "has no split 'dev', only train, test; set data.split")
    bad = datasets.Dataset.from_dict(
        {"text": ["a", "b\udc80".encode("ascii", "replace").decode()], "tools": ["", "[1]"]}
    )
    bad.save_to_disk(tmp_path / "bad")
    refused(lambda: read(tmp_path / "bad"), f"{tmp_path / 'bad'}: row 2: 'tools' changes what a row means")
    (tmp_path / "bad" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.train: .*bad cannot be loaded"):
        read(tmp_path / "bad")


def test_dialects_in_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('instruction,input,output\nhi,a,yes\nwhy,,"because a"\n')
    assert [shown(document) for document in read(tmp_path / "x.csv", make_tokenizer(CHAT))] == [
        "user : hi a <eos> assistant : YES <EOS>",
        "user : why <eos> assistant : BECAUSE A <EOS>",
    ]
