"""Datasets of the hub that are read while they are tokenised: once for each commit, and never without being asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kd_plugin.data import documents as documents_module
from kd_plugin.data.documents import load_documents
from kd_plugin.data.record import Record
from kd_plugin.settings.run import DataConfig, RunConfig
from kd_plugin.training.preflight import early_problems, idle_settings
from tests.chat_data import make_tokenizer, shown
from tests.refusals import refused

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")


class Hub:
    """A dataset that can be streamed only, at a commit."""

    def __init__(self) -> None:
        self.texts, self.commit, self.asked = ["a", "b", "c d"], "0" * 40, []

    def builder(self, name: str, subset: str | None) -> Any:
        def stream(split: str) -> Iterable[dict[str, Any]]:
            self.asked.append((name, subset, split))
            return datasets.IterableDataset.from_generator(self.rows)

        return SimpleNamespace(hash=self.commit, config_id=subset or "default", as_streaming_dataset=stream)

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from ({"text": text} for text in self.texts)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(datasets, "load_dataset_builder", made.builder)
    monkeypatch.delattr(datasets, "load_dataset")
    return made


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the records that were tokenised."""
    places: list[str] = []
    original = documents_module.encode

    def encode(records: Iterable[Record], *given: Any) -> Any:
        return original((places.append(record.where) or record for record in records), *given)

    monkeypatch.setattr(documents_module, "encode", encode)
    return places


def load(tmp_path: Path, **values: Any) -> list[str]:
    values = {"train": "some/texts", "eval_split": "test", "cache": str(tmp_path / "cache"), **values}
    return [shown(document) for document in load_documents(DataConfig(**values), make_tokenizer())[0]]


WANTED = ["A <EOS>", "B <EOS>", "C D <EOS>"]


def test_a_stream_is_tokenised_once_for_each_commit(tmp_path: Path, hub: Hub, tokenised: list[str]) -> None:
    for _ in range(2):
        assert load(tmp_path, streaming=True) == WANTED
    assert len(tokenised) == 6 and hub.asked[:2] == [("some/texts", None, "train"), ("some/texts", None, "test")]
    hub.texts, hub.commit = ["e"], "1" * 40
    assert load(tmp_path, streaming=True) == ["E <EOS>"]
    assert len(tokenised) == 6 + 2
    assert load(tmp_path, streaming=True, subset="small") == ["E <EOS>"]
    assert len(tokenised) == 6 + 4


@pytest.mark.parametrize("commit", [None, "", "abc"])
def test_without_a_commit_every_start_reads_the_stream(
    tmp_path: Path, hub: Hub, tokenised: list[str], commit: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    hub.commit = commit
    with caplog.at_level("INFO"):
        assert load(tmp_path, streaming=True) == load(tmp_path, streaming=True) == WANTED
    assert len(tokenised) == 12
    assert "is tokenised by every process: which state of the hub is streamed is unknown" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_documents_are_streamed_in_any_case(tmp_path: Path, hub: Hub, tokenised: list[str]) -> None:
    assert load(tmp_path, max_documents=2) == WANTED[:2]
    assert len(tokenised) == 4


def test_streaming_is_refused_where_nothing_comes_from_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a b")
    said = f"data.streaming is true, but '{path}' is no dataset name; remove data.streaming"
    refused(lambda: load_documents(DataConfig(train=str(path), streaming=True), make_tokenizer()), said)
    config = RunConfig.model_validate(
        {
            "student": {"from_teacher": {"layers": 2}},
            "teacher": {"model": str(tmp_path)},
            "data": {"train": str(path), "streaming": True},
            "log": {"output_dir": str(tmp_path / "run")},
        }
    )
    assert said in early_problems(config)
    data = DataConfig(train="some/texts", streaming=True, max_documents=3)
    assert (
        "data.streaming has no effect: with data.max_documents datasets of the hub are streamed in any case"
        in idle_settings(config.model_copy(update={"data": data}))
    )
