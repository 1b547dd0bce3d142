"""Held-out documents, packed sequences and batches: nothing is lost, and any number of ranks sees the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_plugin.data.documents import DataError, split_documents
from kd_plugin.data.packing import Document, PackedDataset, TrainBatches, collate, eval_batches, indices_for_step

IGNORED = -100


def make_documents(*lengths: int) -> list[Document]:
    """Documents of ever new ids, so that a token's id says where it comes from."""
    ids = np.arange(100, 100 + sum(lengths), dtype=np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [Document(part, np.ones(len(part), dtype=bool)) for part in parts]


# Held-out text


def test_held_out_documents_depend_on_content_only() -> None:
    documents = make_documents(*[5] * 40)
    train, held_out = split_documents(documents, 0.1)
    assert len(held_out) == 4 and len(train) == 36
    again = split_documents(documents[::-1], 0.1)[1]
    assert sorted(d.input_ids[0] for d in again) == sorted(d.input_ids[0] for d in held_out)


def test_copies_are_never_on_both_sides() -> None:
    documents = make_documents(*[5] * 10) * 3
    train, held_out = split_documents(documents, 0.2)
    assert not {d.input_ids[0] for d in train} & {d.input_ids[0] for d in held_out}
    assert len(train) + len(held_out) == 30 and len(held_out) == 6


def test_single_document_is_cut_in_two() -> None:
    (document,) = make_documents(100)
    (train,), (held_out,) = split_documents([document], 0.05)
    assert np.array_equal(np.concatenate([train.input_ids, held_out.input_ids]), document.input_ids)
    assert len(held_out.input_ids) == 5


def test_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"leaves nothing to train on; lower it, or name held-out text"):
        split_documents(make_documents(5, 5), 0.9)
    # Copies of one document stay together, whatever the fraction.
    with pytest.raises(DataError, match=r"\(1 different\) leaves nothing to train on; name held-out text"):
        split_documents(make_documents(5) * 4, 0.5)
    with pytest.raises(DataError, match=r"one document of 1 token"):
        split_documents(make_documents(1), 0.5)


# Packing


@pytest.mark.parametrize("seq_len", [2, 7, 10])
def test_packing_loses_nothing_but_the_tail(seq_len: int) -> None:
    documents = make_documents(3, 11, 1, 9)
    stream = np.concatenate([document.input_ids for document in documents])
    dataset = PackedDataset(documents, seq_len)
    packed = np.concatenate([dataset[index]["input_ids"] for index in range(len(dataset))])
    assert np.array_equal(packed, stream[: len(packed)]) and len(stream) - len(packed) == dataset.num_left_out
    assert dataset.num_left_out < seq_len
    whole = PackedDataset(documents, seq_len, keep_tail=True)
    labels = np.concatenate([whole[index]["labels"] for index in range(len(whole))])
    starts = [100, 103, 114, 115]
    assert labels[labels != IGNORED].tolist() == [token for token in stream if token not in starts]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_nothing_is_predicted_across_the_start_of_a_document() -> None:
    dataset = PackedDataset(make_documents(3, 4, 5), 12)
    batch = collate([dataset[0]])
    # Row s predicts token s + 1: rows 2 and 6 would predict the first tokens of documents 2 and 3.
    assert batch.loss_rows.tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 10]


def test_untrained_tokens_are_no_targets() -> None:
    document = Document(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1], dtype=bool))
    item = PackedDataset([document], 6, ignore_index=-7)[0]
    assert item["labels"].tolist() == [-7, -7, 2, 3, -7, 5]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 document\(s\) with 7 tokens fill no sequence of data.seq_len 8; lower"):
        PackedDataset(make_documents(3, 4), 8)


# Batches


def test_loss_rows_are_those_whose_next_label_counts() -> None:
    generator = np.random.default_rng(0)
    labels = np.where(generator.random((3, 9)) < 0.4, IGNORED, generator.integers(0, 50, (3, 9)))
    batch = collate([{"input_ids": np.abs(row), "labels": row} for row in labels])
    expected = [b * 9 + s for b in range(3) for s in range(8) if labels[b, s + 1] != IGNORED]
    assert batch.loss_rows.tolist() == expected and batch.num_valid == len(expected)
    assert batch.loss_rows.dtype == batch.labels.dtype == batch.input_ids.dtype == torch.int64
    assert batch.num_tokens == 27
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved.model_inputs().values()} == {"meta"}
    assert moved.num_valid == batch.num_valid and list(moved.model_inputs()) == [
        "input_ids",
        "shift_labels",
        "loss_rows",
    ]
    assert batch.shift_labels[:, :-1].equal(batch.labels[:, 1:]) and (batch.shift_labels[:, -1] == IGNORED).all()


def test_batch_without_targets_has_no_rows() -> None:
    item = {"input_ids": np.zeros(4, dtype=np.int64), "labels": np.full(4, IGNORED)}
    batch = collate([item, item])
    assert batch.num_valid == 0 and batch.loss_rows.shape == (0,)


def test_each_epoch_sees_everything_once_in_its_own_order() -> None:
    # 10 items, 4 a step: epochs end within steps.
    order = np.concatenate([indices_for_step(10, step, 4, seed=3) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert order.tolist() != np.concatenate([indices_for_step(10, step, 4, seed=4) for step in range(5)]).tolist()
    # Any step can be asked for, in any order.
    assert indices_for_step(10, 3, 4, seed=3).tolist() == order[12:16].tolist()


@pytest.mark.parametrize(
    ("world_size", "accumulation", "micro"), [(1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (8, 1, 1)]
)
def test_step_is_the_same_however_it_is_split(world_size: int, accumulation: int, micro: int) -> None:
    dataset = PackedDataset(make_documents(*[13] * 17), 10)
    for step in (0, 1, 5):
        seen: list[list[int]] = []
        for rank in range(world_size):
            batches = TrainBatches(
                dataset, micro_batch_size=micro, gradient_accumulation_steps=accumulation,
                seed=1, rank=rank, world_size=world_size,
            )  # fmt: skip
            micro_batches = batches.step(step)
            assert len(micro_batches) == accumulation
            assert all(batch.input_ids.shape == (micro, 10) for batch in micro_batches)
            seen += [row for batch in micro_batches for row in batch.input_ids.tolist()]
        expected = [dataset[i]["input_ids"].tolist() for i in indices_for_step(len(dataset), step, 8, 1)]
        assert sorted(seen) == sorted(expected)


def test_step_larger_than_the_data_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    dataset = PackedDataset(make_documents(30), 10)
    batches = TrainBatches(dataset, micro_batch_size=2, gradient_accumulation_steps=2, seed=0)
    assert "one step takes 4 sequences and there are 3" in caplog.text
    assert batches.epochs(6) == 8


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_the_same_text_on_any_number_of_ranks(world_size: int) -> None:
    dataset = PackedDataset(make_documents(*[9] * 9), 8, keep_tail=True)
    shares = [
        list(eval_batches(dataset, num_sequences=5, micro_batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [row for share in shares for batch in share for row in batch.input_ids[batch.labels[:, 1] >= 0].tolist()]
    assert sorted(counted) == sorted(dataset[index]["input_ids"].tolist() for index in (0, 2, 4, 6, 8))
    everything = eval_batches(dataset, num_sequences=99, micro_batch_size=2)
    valid = sum(int((dataset[index]["labels"][1:] != IGNORED).sum()) for index in range(len(dataset)))
    assert sum(batch.num_valid for batch in everything) == valid
