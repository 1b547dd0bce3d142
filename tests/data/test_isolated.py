"""Packing that keeps documents apart: whole where they fit, no token lost or twice, little padding, never counted."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from kd_plugin.data.best_fit import best_fit
from kd_plugin.data.isolated import IsolatedDataset
from kd_plugin.data.packing import Document, TrainBatches, collate, eval_batches
from kd_plugin.data.record import DataError

IGNORED = -100


def make_documents(*lengths: int) -> list[Document]:
    """Documents of ever new ids, so that a token's id says where it comes from."""
    ids = np.arange(100, 100 + sum(lengths), dtype=np.int32)
    return [Document(part, np.ones(len(part), dtype=bool)) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def pieces_of(dataset: IsolatedDataset) -> list[list[int]]:
    """The ids of every piece of every sequence, padding left out."""
    pieces = []
    for index in range(len(dataset)):
        item = dataset[index]
        starts = np.flatnonzero(item["position_ids"] == 0)
        pieces += [part.tolist() for part in np.split(item["input_ids"], starts) if part.any()]
    return pieces


def test_documents_that_fit_stay_whole_and_longer_ones_are_cut() -> None:
    documents = make_documents(3, 11, 25, 2, 9, 10, 7)
    dataset = IsolatedDataset(documents, 10)
    wanted = [
        part.tolist()
        for document in documents
        for part in np.split(document.input_ids, range(10, len(document.input_ids), 10))
        if len(part) > 1  # the last token of the second document has nothing to predict in its piece
    ]
    assert sorted(pieces_of(dataset)) == sorted(wanted) and dataset.num_left_out == 1


def test_positions_start_anew_and_nothing_is_predicted_across() -> None:
    dataset = IsolatedDataset(make_documents(4, 3, 2, 13), 10, seed=3)
    batch = collate([dataset[index] for index in range(len(dataset))])
    ids, positions, shifted = (t.numpy() for t in (batch.input_ids, batch.position_ids, batch.shift_labels))
    assert positions.shape == ids.shape and (positions[:, 0] == 0).all()
    inside = positions[:, 1:] != 0
    assert (np.diff(positions)[inside] == 1).all()
    real = ids[:, 1:] != 0
    assert np.array_equal(shifted[:, :-1], np.where(inside & real, ids[:, 1:], IGNORED))
    assert batch.num_valid == (4 - 1) + (3 - 1) + (2 - 1) + (10 - 1) + (3 - 1)
    assert np.array_equal(batch.model_inputs()["position_ids"].numpy(), positions)


def test_padding_is_counted_and_is_a_document_of_its_own() -> None:
    dataset = IsolatedDataset(make_documents(7, 6), 10)
    assert len(dataset) == 2 and dataset.padding == pytest.approx(7 / 20)
    for index, length in ((0, 7), (1, 6)):
        item = dataset[index]
        assert item["position_ids"].tolist() == [*range(length), *range(10 - length)]
        assert (item["labels"][length:] == IGNORED).all()


def test_much_padding_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    IsolatedDataset(make_documents(*[6] * 20), 10)
    assert "40.0 % of what the models read is padding" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        IsolatedDataset(make_documents(*[5] * 20), 10)
    assert "0.00 % padding" in caplog.text and "is padding, as the documents" not in caplog.text


@pytest.mark.parametrize("seed", [0, 1])
def test_realistic_lengths_leave_less_than_two_percent(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = np.clip(np.exp(generator.normal(5.3, 0.9, 3000)), 5, 1024).astype(int)  # conversations: median 200
    bins = best_fit(lengths, 1024)
    assert sorted(piece for each in bins for piece in each) == list(range(3000))
    used = [int(lengths[each].sum()) for each in bins]
    assert max(used) <= 1024 and 1 - sum(used) / (1024 * len(bins)) < 0.02


def test_best_fit_fills_the_fullest_bin_that_has_room() -> None:
    assert [each.tolist() for each in best_fit(np.array([6, 5, 4, 3, 2]), 10)] == [[0, 2], [1, 3, 4]]
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 18, 200)
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):  # the textbook's definition
        fitting = [index for index, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= length
        else:
            room.append(17 - length)
    found = best_fit(lengths, 17)
    assert sorted(17 - int(lengths[each].sum()) for each in found) == sorted(room)


def test_the_seed_decides_who_shares_a_sequence_and_nothing_else() -> None:
    documents = make_documents(*[3] * 40, *[7] * 40)
    one, same, other = (IsolatedDataset(documents, 10, seed=seed) for seed in (1, 1, 2))
    rows = [[dataset[index]["input_ids"].tolist() for index in range(40)] for dataset in (one, same, other)]
    assert rows[0] == rows[1] != rows[2]
    assert np.array_equal(*(np.sort(np.concatenate(each)) for each in (rows[0], rows[2])))
    # Of equal lengths, neighbours in the data do not meet by order
    assert any(abs(row[0] - row[7]) > 3 * 80 / 2 for row in rows[0])


def test_untrained_pieces_are_left_out_and_prompts_are_no_targets() -> None:
    prompt = Document(np.arange(1, 26, dtype=np.int32), np.array([False] * 22 + [True] * 3))
    dataset = IsolatedDataset([prompt], 10)
    assert len(dataset) == 1 and dataset.num_left_out == 20
    assert dataset[0]["input_ids"].tolist()[:5] == [21, 22, 23, 24, 25]
    assert dataset[0]["labels"].tolist()[:5] == [IGNORED, IGNORED, 23, 24, 25]
    whole = Document(prompt.input_ids, np.zeros(25, dtype=bool))
    with pytest.raises(DataError, match=r"no document has a token to train on within data\.seq_len 10"):
        IsolatedDataset([whole], 10)


def test_too_little_text_is_refused_but_in_evaluation() -> None:
    with pytest.raises(DataError, match=r"2 document\(s\) with 7 tokens fill no sequence of data.seq_len 8; lower"):
        IsolatedDataset(make_documents(3, 4), 8)
    assert len(IsolatedDataset(make_documents(3, 4), 8, keep_tail=True)) == 1


def test_steps_and_evaluation_read_it_as_any_other() -> None:
    dataset = IsolatedDataset(make_documents(*[5] * 30), 10)
    seen = []
    for rank in (0, 1):
        batches = TrainBatches(
            dataset, micro_batch_size=2, gradient_accumulation_steps=1, seed=1, rank=rank, world_size=2
        )
        seen += [batch.position_ids for batch in batches.step(0)]
    assert all(positions is not None and positions.shape == (2, 10) for positions in seen)
    held_out = IsolatedDataset(make_documents(*[5] * 7), 10, keep_tail=True)
    valid = sum(batch.num_valid for batch in eval_batches(held_out, num_sequences=99, micro_batch_size=3))
    assert valid == 7 * 4
