"""Which rows the soft loss has where it counts on all tokens: never padding, never across documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_plugin.data.isolated import IsolatedDataset, pack
from kd_plugin.data.packing import Batch, Document, PackedDataset, Sequences, TrainBatches, collate, eval_batches
from kd_plugin.settings.run import DataConfig

LENGTHS = (7, 4, 12, 3, 1)


def make_documents() -> list[Document]:
    """Token ids count up over all documents, and of each the last third is trained on."""
    documents, start = [], 100
    for length in LENGTHS:
        ids = np.arange(start, start + length, dtype=np.int32)
        documents.append(Document(ids, np.arange(length) >= 2 * length // 3))
        start += length
    return documents


def pairs_of(batch: Batch) -> list[tuple[int, int]]:
    """The two tokens of each row that counts: the one that it reads last, and the one that it predicts."""
    rows = batch.loss_rows.tolist()
    ids, length = batch.input_ids.flatten().tolist(), batch.input_ids.shape[1]
    assert all(row % length < length - 1 for row in rows)
    return sorted((ids[row], ids[row + 1]) for row in rows)


def whole(dataset: Sequences) -> Batch:
    return collate([dataset[index] for index in range(len(dataset))])


def pairs_within(cut: int | None = None, joined: bool = False) -> list[tuple[int, int]]:
    """Each two neighbours of a document, unless a sequence of `cut` tokens ends between them."""
    found, before = [], 0
    for document in make_documents():
        for place in range(1, len(document.input_ids)):
            at = before + place if joined else place
            if cut is None or at % cut:
                found.append((int(document.input_ids[place - 1]), int(document.input_ids[place])))
        before += len(document.input_ids)
    return found


def test_isolated_every_pair_within_a_piece_counts_once() -> None:
    dataset = IsolatedDataset(make_documents(), 10, seed=1, soft_on_all=True)
    batch = whole(dataset)
    assert sum(map(dataset.num_padding, range(len(dataset)))) > 0
    assert pairs_of(batch) == pairs_within(cut=10)
    trained = pairs_of(whole(IsolatedDataset(make_documents(), 10, seed=1)))
    assert batch.num_trained == len(trained) < batch.num_valid
    assert set(trained) < set(pairs_of(batch))


def test_a_piece_that_is_a_prompt_alone_stays_and_a_single_token_goes() -> None:
    prompt = Document(np.arange(15, dtype=np.int32) + 5, np.arange(15) >= 11)
    kept = IsolatedDataset([prompt, Document(np.array([3], np.int32), np.array([True]))], 10, soft_on_all=True)
    assert kept.num_left_out == 1 and len(pairs_of(whole(kept))) == 9 + 4
    assert IsolatedDataset([prompt], 10).num_left_out == 10


def test_joined_no_pair_goes_across_a_document_or_a_sequence() -> None:
    dataset = PackedDataset(make_documents(), 10, keep_tail=True, soft_on_all=True)
    assert pairs_of(whole(dataset)) == pairs_within(cut=10, joined=True)
    assert dataset.num_padding(len(dataset) - 1) == 3


@pytest.mark.parametrize("packing", ["isolated", "joined"])
def test_a_sequence_that_fills_up_an_evaluation_counts_in_no_loss(packing: str) -> None:
    config = DataConfig(seq_len=10, packing=packing)
    dataset = pack(make_documents(), config, -100, seed=0, keep_tail=True, soft_on_all=True)
    given = {"num_sequences": 9, "micro_batch_size": 2, "world_size": 2}
    batches = [batch for rank in (0, 1) for batch in eval_batches(dataset, rank=rank, **given)]
    assert sum(batch.num_valid for batch in batches) == len(pairs_of(whole(dataset)))
    assert sum(batch.num_trained for batch in batches) == whole(dataset).num_trained


def test_a_batch_keeps_both_numbers_on_its_way_to_a_device() -> None:
    dataset = IsolatedDataset(make_documents(), 10, soft_on_all=True)
    (batch,) = TrainBatches(dataset, micro_batch_size=3, gradient_accumulation_steps=1, seed=0).step(0)
    moved = batch.to("cpu")
    assert (moved.num_valid, moved.num_trained) == (batch.num_valid, batch.num_trained)
    assert torch.equal(moved.loss_rows, batch.loss_rows) and "scored" not in moved.model_inputs()
