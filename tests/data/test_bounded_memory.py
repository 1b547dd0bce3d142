"""Text that does not fit into memory: four times the text takes as much, but for the index of its documents."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_plugin.data import files, packing
from kd_plugin.data.columns import RowReader
from kd_plugin.data.documents import TrainBatches, load_datasets
from kd_plugin.data.encoding import encode
from kd_plugin.data.files import read_file
from kd_plugin.data.record import Record
from kd_plugin.data.records import open_source
from kd_plugin.settings.run import DataConfig
from tests.chat_data import WORDS, make_tokenizer, write_jsonl

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

TEXT = 4000  # characters of a document
OF_INDEX, NOISE = 150, 10 * 2**20  # bytes a document or piece of one, and what allocators keep or not


def text_of(draw: random.Random, length: int) -> str:
    words = draw.choices(WORDS[3:], k=length // 4)
    return " ".join(words)[:length]


def write(path: Path, megabytes: int) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(megabytes * 10**6 // TEXT):
            file.write(json.dumps({"text": text_of(draw, TEXT)}) + "\n")
    return path


def started(source: Path, cache: Path) -> dict[str, Any]:
    """What a fresh process that loads `source` prints."""
    cache.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.data.memory_worker", str(source), str(cache)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_text_takes_its_index_more(tmp_path: Path) -> None:
    found = {}
    for megabytes in (20, 80):
        source = write(tmp_path / f"{megabytes}.jsonl", megabytes)
        caches = [tmp_path / f"{megabytes}-{number}" for number in range(3)]
        # The least of three: what an allocator keeps is not always the same
        first = min((started(source, cache) for cache in caches), key=lambda start: start["peak"])
        second = started(source, caches[0])
        found[megabytes] = [first, second]
        assert first["digest"] == second["digest"]
        assert second["seconds"] < 5
    print(json.dumps(found))
    documents = found[80][0]["documents"] - found[20][0]["documents"]
    tokens = found[80][0]["tokens"] - found[20][0]["tokens"]
    allowed = OF_INDEX * (documents + tokens // DataConfig().seq_len) + NOISE
    assert allowed < 5 * tokens / 4, "the test would see a fourth of the tokens in memory"
    for small, large in zip(found[20], found[80], strict=True):
        assert large["peak"] - small["peak"] < allowed
        assert large["reading"] - small["reading"] < allowed


# What each step holds


def lengths_alive(records: Iterator[Record], number: list[int]) -> Iterator[Record]:
    for record in records:
        number[0] += 1
        yield record


@pytest.mark.parametrize(("length", "most"), [(2**18, 5), (10, 256)])
def test_no_more_text_is_held_than_goes_into_one_call(length: int, most: int) -> None:
    """2**18 characters: four records make 2**20, and the next begins another call."""
    number, seen = [0], 0
    records = (Record("text", {"text": "a " * (length // 2)}, "") for _ in range(600 if length == 10 else 13))
    for _ in encode(lengths_alive(records, number), make_tokenizer()):
        seen += 1
        assert number[0] - seen < most


def jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_list(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows))


def compressed(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def table(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(["text", *(row["text"] for row in rows)]))


def parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "x.jsonl": jsonl,
    "x.json": as_list,
    "x.jsonl.gz": compressed,
    "x.csv": table,
    "x.parquet": parquet,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(".gz")) for name in WRITERS]
)
def test_no_file_of_rows_is_held_whole(tmp_path: Path, name: str) -> None:
    import tracemalloc

    draw = random.Random(0)
    rows = [{"text": text_of(draw, TEXT)} for _ in range(3000)]
    WRITERS[name](tmp_path / name, rows)
    number = len(rows)
    del rows
    tracemalloc.start()
    try:
        records = read_file(tmp_path / name, RowReader(DataConfig()))
        assert sum(1 for _ in records) == number
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < number * TEXT / 2


def test_what_a_file_is_known_by_is_read_in_pieces(tmp_path: Path) -> None:
    import tracemalloc

    path = write(tmp_path / "x.jsonl", 8)
    tracemalloc.start()
    try:
        open_source(str(path), DataConfig(), name="data.train", split="train").identity()
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_a_long_text_file_is_said_to_be_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_LARGE_TEXT", 10**6)
    (tmp_path / "x.txt").write_text("a " * 10**6)
    assert len(list(read_file(tmp_path / "x.txt", RowReader(DataConfig())))) == 1
    assert f"{tmp_path}/x.txt: 2 million characters are one document, which is tokenised whole" in caplog.text


# The same steps, from wherever they are read


@pytest.mark.parametrize("how", ["isolated", "joined"])
def test_steps_from_mapped_files_are_those_from_memory_and_any_can_be_asked_for(tmp_path: Path, how: str) -> None:
    draw = random.Random(1)
    sources = [
        {"source": write_jsonl(tmp_path / f"{name}.jsonl", *rows), "weight": weight}
        for name, weight, rows in (
            ("a", 1, [{"text": text_of(draw, draw.randint(4, 300))} for _ in range(150)]),
            ("b", 3, [{"prompt": text_of(draw, 60), "completion": text_of(draw, 200)} for _ in range(40)]),
        )
    ]
    values: dict[str, Any] = {"train": sources, "eval_fraction": 0.2, "seq_len": 33, "packing": how}
    found = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        train, held_out = load_datasets(DataConfig(**values, cache=cache), make_tokenizer(), -100, seed=5)
        batches = TrainBatches(train, micro_batch_size=2, gradient_accumulation_steps=2, seed=5)
        steps = [batches.step(step) for step in (range(40) if len(found) < 2 else reversed(range(40)))]
        steps = steps if len(found) < 2 else steps[::-1]
        inputs = [value.tolist() for step in steps for batch in step for value in batch.model_inputs().values()]
        found.append((inputs, [held_out[index]["labels"].tolist() for index in range(len(held_out))]))
        packing._order.cache_clear()
    assert found[0] == found[1] == found[2]


def test_documents_without_a_key_are_mapped_from_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_plugin.data import tokenized_cache

    source = write_jsonl(tmp_path / "x.jsonl", *({"text": text_of(random.Random(i), 300)} for i in range(50)))
    config = DataConfig(train=source, cache=str(tmp_path / "cache"), seq_len=64)
    wanted, _ = load_datasets(config, make_tokenizer(), -100, seed=0)
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    monkeypatch.setattr(tokenized_cache, "_key", lambda *_: None)
    found, _ = load_datasets(config, make_tokenizer(), -100, seed=0)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == kept
    assert not found.documents[0].input_ids.flags.owndata and not found.documents[0].input_ids.flags.writeable
    for index in range(len(wanted)):
        assert np.array_equal(found[index]["input_ids"], wanted[index]["input_ids"])
