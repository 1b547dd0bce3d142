"""Several sources: each has its share of the tokens, nothing is left out, and nothing held out is trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_plugin.data.documents import load_documents
from kd_plugin.data.mixture import Part, mixed
from kd_plugin.data.packing import Document
from kd_plugin.settings.run import DataConfig
from tests.chat_data import CHAT, CONVERSATION, make_tokenizer, shown, write_jsonl
from tests.refusals import refused

pytest.importorskip("transformers")


def made(lengths: list[int], first: int) -> list[Document]:
    """Documents that all differ, in all sources with another `first`."""
    ids = [np.full(length, first + index, dtype=np.int32) for index, length in enumerate(lengths)]
    return [Document(row, np.ones(len(row), dtype=bool)) for row in ids]


def tokens_by_source(documents: Sequence[Document]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for document in documents:
        counts[int(document.input_ids[0]) // 1000] += len(document.input_ids)
    return counts


LENGTHS = np.random.default_rng(0).integers(1, 40, (3, 50)).tolist()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 5.0, 2.0)])
def test_each_source_has_its_share_of_the_tokens_all_along(weights: tuple[float, ...]) -> None:
    lengths = [LENGTHS[0], LENGTHS[1][:7], LENGTHS[2]]
    parts = [Part(str(i), w, made(row, 1000 * i)) for i, (w, row) in enumerate(zip(weights, lengths, strict=True))]
    documents = mixed(parts)
    total = sum(len(document.input_ids) for document in documents)
    for length in (len(documents), len(documents) // 2, len(documents) // 3):
        counts = tokens_by_source(documents[:length])
        size = sum(counts.values())
        for number, weight in enumerate(weights):
            # One document of each source may be on the wrong side of the cut.
            assert abs(counts[number] - weight / sum(weights) * size) <= 2 * 40, (length, number)
    assert total >= sum(map(sum, lengths))


def test_every_document_is_read_and_none_twice_more_than_another() -> None:
    parts = [Part("a", 3.0, made([10] * 4, 0)), Part("b", 1.0, made([7] * 10, 1000))]
    times = Counter(int(document.input_ids[0]) for document in mixed(parts))
    assert len(times) == 14 and all(times[1000 + index] == 1 for index in range(10))
    assert sum(times[index] for index in range(4)) == 21  # three times the 70 tokens of the other
    assert {times[index] for index in range(4)} == {5, 6}


def test_the_mixture_depends_on_the_documents_alone() -> None:
    parts = [Part("a", 1.0, made([3, 9, 4], 0)), Part("b", 2.5, made([5, 2], 1000))]
    first, second = mixed(parts), mixed(parts)
    assert [a.input_ids.tolist() for a in first] == [b.input_ids.tolist() for b in second]


def test_a_weight_that_repeats_a_source_without_end_is_refused() -> None:
    parts = [Part("data.train[0]", 1.0, made([2], 0)), Part("data.train[1]", 1.0, made([300], 1000))]
    refused(lambda: mixed(parts), "data.train[0]: for its weight, 1 of 2, its 2 tokens would be repeated 150.0 times")
    parts = [Part("data.train[0]", 1.0, made([300], 0)), Part("data.train[1]", 50.0, made([300], 1000))]
    refused(lambda: mixed(parts), "data.train[1]: for its weight, 50 of 51, its 300 tokens", "50.0 times; lower")


def load(tmp_path: Path, **values: Any) -> tuple[list[str], list[str]]:
    train, held_out = load_documents(DataConfig(**values), make_tokenizer(CHAT))
    return [shown(document) for document in train], [shown(document) for document in held_out]


def test_sources_have_columns_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chats = write_jsonl(tmp_path / "chats.jsonl", {"talk": CONVERSATION[:2]})
    texts = write_jsonl(tmp_path / "texts.jsonl", {"body": "a b c d a"})
    sources = [
        {"source": chats, "weight": 2, "columns": {"messages": "talk"}},
        {"source": texts, "weight": 2, "text_column": "body"},
    ]
    train, held_out = load(tmp_path, train=sources, eval=write_jsonl(tmp_path / "eval.jsonl", {"text": "e"}))
    assert sorted(train) == ["A B C D A <EOS>", "user : hi <eos> assistant : YES <EOS>"]
    assert held_out == ["E <EOS>"]
    assert "data.train[0]: 50.0 % of the tokens, its documents 1.00 times" in caplog.text


def test_nothing_held_out_is_trained_on_from_another_source(tmp_path: Path) -> None:
    words = [f"{a} {b} {c}" for a in "abcdefg" for b in "abcdefg" for c in "abcdefg"]
    one = write_jsonl(tmp_path / "one.jsonl", *({"text": text} for text in words[:40]))
    two = write_jsonl(tmp_path / "two.jsonl", *({"text": text} for text in words[20:60]))
    train, held_out = load(tmp_path, train=[{"source": one, "weight": 3}, {"source": two}], eval_fraction=0.3)
    assert len(held_out) == 24
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == {f"{text.upper()} <EOS>" for text in words[:60]}


def test_settings_of_a_source_that_it_cannot_heed_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", {"text": "a"})
    sources = [{"source": file}, {"source": "python_docs", "split": "test"}]
    refused(lambda: load(tmp_path, train=sources), "data.train[1].split is 'test'", "is no dataset name")
    sources = [{"source": file}, {"source": "some/texts"}]
    refused(lambda: load(tmp_path, train=sources, eval_split="test"), f"data.eval_split is 'test', but '{file}'")
    refused(lambda: DataConfig(train=[]), "train is an empty list: name a source")
