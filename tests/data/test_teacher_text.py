"""The teacher's own text of a conversation: what it is, how its answers correspond, how both sides are packed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_plugin.data.documents import DataError, load_documents
from kd_plugin.data.isolated import pack
from kd_plugin.data.packing import Document, collate
from kd_plugin.data.paired import PairedDataset
from kd_plugin.data.teacher_text import TeacherReader
from kd_plugin.settings.run import DataConfig, TeacherInputConfig
from tests.chat_data import CHAT, CONVERSATION, MARKED_CHAT, WORDS, make_tokenizer, write_jsonl
from tests.refusals import refused

pytest.importorskip("transformers")

# As CHAT, with other words around what is said.
OTHER = (
    "{{ '<bos> ' }}{% for message in messages %}{{ 'a b ' + message.role + ' : ' + message.content + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a b assistant : ' }}{% endif %}"
)
# Ends each turn with another token than CHAT.
OTHER_END = OTHER.replace("<eos>", "<bos>")


def read(
    tmp_path: Path, *rows: Any, template: str = CHAT, data: dict[str, Any] | None = None, **own: str
) -> list[Document]:
    source, tokenizer = write_jsonl(tmp_path / "x.jsonl", *rows), make_tokenizer(template)
    config = DataConfig(train=source, eval=source, **(data or {}))
    return load_documents(config, tokenizer, TeacherReader(TeacherInputConfig(**own), tokenizer))[0]


def teachers(document: Document) -> str:
    """What the teacher reads, in words, the answers in upper case."""
    assert document.teacher is not None
    words = [WORDS[index] for index in document.teacher.input_ids]
    answers = set(document.teacher.at[document.teacher.at >= 0].tolist())
    return " ".join(word.upper() if place in answers else word for place, word in enumerate(words))


def test_a_system_prompt_of_its_own(tmp_path: Path) -> None:
    row = {"messages": CONVERSATION}
    (document,) = read(tmp_path, row, system="c d")
    assert teachers(document) == (
        "system : c d <eos> user : hi <eos> assistant : YES <EOS> user : why <eos> assistant : BECAUSE A <EOS>"
    )
    own = {"messages": [{"role": "system", "content": "e"}, *CONVERSATION]}
    (document,) = read(tmp_path, own, system="c d", data={"train_on": "last"})
    assert teachers(document).startswith("system : c d <eos> user : hi <eos> assistant : yes <eos> user")
    assert teachers(document).endswith("assistant : BECAUSE A <EOS>")
    assert "e" not in teachers(document).split()


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_a_template_of_its_own_by_file_or_text(tmp_path: Path, template: str) -> None:
    (tmp_path / "own.jinja").write_text(OTHER)
    for own in (OTHER, str(tmp_path / "own.jinja")):
        (document,) = read(tmp_path, {"messages": CONVERSATION}, template=template, chat_template=own)
        assert teachers(document) == (
            "<bos> a b user : hi <eos> a b assistant : YES <EOS> a b user : why <eos> a b assistant : BECAUSE A <EOS>"
        )
        assert document.teacher is not None
        trained = np.flatnonzero(document.trained)
        assert (document.teacher.input_ids[document.teacher.at[trained]] == document.input_ids[trained]).all()
        assert (document.teacher.at >= 0).tolist() == document.trained.tolist()


def test_prompts_and_completions_of_turns_and_a_turn_that_is_not_trained(tmp_path: Path) -> None:
    row = {"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}
    assert teachers(read(tmp_path, row, system="c")[0]).endswith(
        "assistant : yes <eos> user : why <eos> assistant : BECAUSE A <EOS>"
    )
    turns = [CONVERSATION[0], {**CONVERSATION[1], "weight": 0}, *CONVERSATION[2:]]
    assert "yes <eos> user" in teachers(read(tmp_path, {"messages": turns}, system="c")[0])


def test_answers_of_other_tokens_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A template that says `b` instead of what was said, where it is asked `why`."""
    own = CHAT.replace("message.content", "(message.content if message.content != 'because a' else 'b')")
    rows = [{"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}, {"messages": CONVERSATION}]
    with caplog.at_level(logging.WARNING):
        (document,) = read(tmp_path, *rows, chat_template=own)
    assert teachers(document).endswith("YES <EOS>")
    assert "2 record(s)" in caplog.text and "2 x answer whose tokens are others as the teacher reads it" in caplog.text
    assert f"(first: {tmp_path}/x.jsonl:1)" in caplog.text


def test_where_no_answer_corresponds_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text to train on .*answer whose tokens are others"):
        read(tmp_path, {"messages": CONVERSATION}, chat_template=OTHER_END)


def test_what_is_no_conversation_or_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for row in ({"text": "a b"}, {"prompt": "a", "completion": "b"}):
        refused(lambda row=row: read(tmp_path, row, system="c"), "x.jsonl:1", "teacher.input renders conversations")
    refused(
        lambda: read(tmp_path, {"messages": CONVERSATION}, chat_template="no/such.jinja"), "teacher.input.chat_template"
    )
    broken = "{% for %}"
    refused(
        lambda: read(tmp_path, {"messages": CONVERSATION}, chat_template=broken), "x.jsonl:1", "as the teacher reads it"
    )
    refused(lambda: TeacherInputConfig(), "says nothing", "set system or chat_template")


def make_documents() -> list[Document]:
    """Texts of 4 to 11 tokens with their teachers', longer or shorter, the answers in the middle."""
    from kd_plugin.data.corpus import TeacherText

    generator, documents = np.random.default_rng(0), []
    for number in range(23):
        answer = generator.integers(100, 200, 2 + number % 3).astype(np.int32)
        (before, after), (other, behind) = generator.integers(1, 5, (2, 2))
        ids = np.concatenate([np.arange(before), answer, np.arange(after)]).astype(np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        trained[before : before + len(answer)] = True
        theirs = np.concatenate([np.arange(50, 50 + other), answer, np.arange(behind)]).astype(np.int32)
        at = np.full(len(ids), -1)
        at[trained] = other + np.arange(len(answer))
        documents.append(Document(ids, trained, "", TeacherText(theirs, at)))
    return documents


def test_rows_of_both_sides_predict_the_same_token_and_none_is_lost() -> None:
    documents = make_documents()
    dataset = pack(documents, DataConfig(seq_len=16), -100, seed=3, keep_tail=False)
    assert isinstance(dataset, PairedDataset)
    batch = collate([dataset[index] for index in range(len(dataset))])
    assert batch.num_valid == sum(int(document.trained.sum()) for document in documents)
    rows, own = batch.of_teacher["teacher_rows"].flatten(), batch.loss_rows
    assert ((rows >= 0).nonzero().flatten() == own).all()
    ids = batch.of_teacher["teacher_input_ids"].flatten()
    assert (ids[rows[own] + 1] == batch.shift_labels.flatten()[own]).all()
    assert (ids[rows[own]] != batch.input_ids.flatten()[own]).any(), "other contexts"
    for name, texts in (("input_ids", [d.input_ids for d in documents]), ("teacher_input_ids", dataset.documents)):
        given = [t if isinstance(t, np.ndarray) else t.teacher.input_ids for t in texts]
        assert sorted(map(tuple, given)) == sorted(_texts(dataset, name))


def _texts(dataset: PairedDataset, name: str) -> list[tuple[int, ...]]:
    """The texts of one side, cut where positions start anew, without padding."""
    found = []
    for index in range(len(dataset)):
        item = dataset[index]
        positions = item[name.replace("input_ids", "position_ids")]
        pieces = np.split(item[name], np.flatnonzero(positions == 0)[1:])
        number = len(dataset._bins[index])
        found += [tuple(piece.tolist()) for piece in pieces[:number]]
    return found


def test_what_is_too_long_on_either_side_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    documents = make_documents()
    longest = [max(len(d.input_ids), len(d.teacher.input_ids)) for d in documents]
    with caplog.at_level(logging.WARNING):
        dataset = PairedDataset(documents, 9)
    assert len(dataset.documents) == sum(n <= 9 for n in longest) < len(documents)
    assert f"{sum(n > 9 for n in longest)} conversation(s) are left out" in caplog.text
    refused(lambda: PairedDataset(documents, 3), "no conversation fits data.seq_len 3", str(min(longest)))
    refused(lambda: PairedDataset(documents[:1], 100), "fill no sequence")
    assert len(PairedDataset(documents[:1], 100, keep_tail=True)) == 1
