"""Documents packed into one sequence give the loss and the gradients of the same documents one by one, under the
attached loss and under the model's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.data.isolated import IsolatedDataset
from kd_plugin.data.packing import Batch, Document, collate
from kd_plugin.plugin.isolation import Way, isolated, ways_of
from tests import oracle
from tests.refusals import refused
from tests.tiny_models import LAYER_TYPES, VOCAB, assert_same_gradients, gradients_of, make_model

# What each needs, with windows of 8 that documents of up to 21 tokens leave
NEEDS: dict[str, Way] = {
    **dict.fromkeys(("llama", "qwen3", "gpt2", "gemma3"), "position_ids"),
    **dict.fromkeys(("opt", "gpt_oss", "falcon", "bloom", "mpt"), "mask"),
}
SETTINGS: dict[str, dict[str, Any]] = {"gemma3": {"sliding_window": 8, "layer_types": LAYER_TYPES}}
LENGTHS = (7, 21, 5, 9, 2, 11, 3)


def make(name: str, seed: int, **settings: Any) -> nn.Module:
    return make_model(name, seed=seed, dtype=torch.float32, **SETTINGS.get(name, {}), **settings)


def make_documents() -> list[Document]:
    generator = np.random.default_rng(0)
    return [Document(generator.integers(3, VOCAB, n).astype(np.int32), generator.random(n) < 0.8) for n in LENGTHS]


def packed_batch() -> Batch:
    dataset = IsolatedDataset(make_documents(), 24, seed=2)
    batch = collate([dataset[index] for index in range(len(dataset))])
    assert len(dataset) == 3 and dataset.padding > 0
    return batch


def padded_batch() -> dict[str, Tensor]:
    """One document in each row, padded on the right under a mask."""
    ids, mask = (torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(make_documents()):
        length, own = len(document.input_ids), torch.from_numpy(document.input_ids).long()
        ids[row, :length], mask[row, :length] = own, 1
        labels[row, :length] = torch.where(torch.from_numpy(document.trained), own, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits `[n, V]` of the rows that predict a target, each document in a forward of its own."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0]
        rows.append(logits[:-1][labels[1:length] != -100])
    return torch.cat(rows)


@pytest.mark.parametrize("name", NEEDS)
def test_packed_equals_padded_under_the_attached_loss(name: str) -> None:
    student, teacher = make(name, 1), make(name, 2)
    config = kd.DistillConfig(temperature=2.0, soft_weight=0.7, hard_weight=0.3, chunk_size=16, row_kernel="eager")
    padded, packed = padded_batch(), packed_batch().model_inputs()
    targets = padded["labels"][:, 1:].flatten()
    targets = targets[targets != -100]

    def dense() -> Tensor:
        with torch.no_grad():
            teachers = alone(teacher, padded)
        return oracle.distill_logits(alone(student, padded), teachers, targets, config).loss

    wanted, wanted_gradients = dense().item(), gradients_of(student, dense)
    plugin = kd.attach(student, teacher, config)
    for side in plugin.sides.values():
        side.isolation = NEEDS[name]
    for inputs in (packed, padded):
        assert student(**inputs).loss.item() == pytest.approx(wanted, rel=1e-5)
        found = gradients_of(student, lambda inputs=inputs: student(**inputs).loss)
        assert_same_gradients(found, wanted_gradients, 1e-5)


@pytest.mark.parametrize("name", NEEDS)
def test_packed_equals_padded_under_the_plain_loss(name: str) -> None:
    model, padded, batch = make(name, 1), padded_batch(), packed_batch()
    targets = padded["labels"][:, 1:].flatten()
    targets = targets[targets != -100]

    def dense() -> Tensor:
        return nn.functional.cross_entropy(alone(model, padded), targets)

    def own() -> Tensor:
        inputs = {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
        with isolated(model.forward, NEEDS[name], inputs) as inputs:
            return model(**inputs, use_cache=False).loss

    wanted = gradients_of(model, dense)
    assert own().item() == pytest.approx(dense().item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, own), wanted, 1e-5)
    plugin = kd.attach(model, None, kd.DistillConfig(soft_weight=0, hard_weight=1, chunk_size=16, row_kernel="eager"))
    plugin.sides["student"].isolation = NEEDS[name]
    inputs = batch.model_inputs()
    assert_same_gradients(gradients_of(model, lambda: model(**inputs).loss), wanted, 1e-5)


@pytest.mark.parametrize("name", [name for name, way in NEEDS.items() if way == "mask"])
def test_positions_alone_leak_where_a_model_keeps_them_from_its_masks(name: str) -> None:
    """Else the other way would be tested by nothing."""
    model, batch = make(name, 1), packed_batch()
    changed = batch.input_ids.clone()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % (VOCAB - 3)
    later = int((batch.position_ids[-1] == 0).nonzero()[1])  # the last row's second document
    for way, leaks in (("position_ids", True), ("mask", False)):
        rows = []
        for ids in (batch.input_ids, changed):
            with isolated(model.forward, way, {"input_ids": ids, "position_ids": batch.position_ids}) as inputs:
                rows.append(model(**inputs, use_cache=False).logits[-1, later:])
        assert (rows[0] - rows[1]).abs().max() > 1e-3 if leaks else torch.equal(*rows)


def test_teacher_and_student_may_need_different_ways_and_the_teacher_may_run_ahead() -> None:
    student, teacher = make("llama", 1), make("bloom", 2)
    config = kd.DistillConfig(chunk_size=16, row_kernel="eager")
    batch = packed_batch()
    micro_batches = [
        {"input_ids": batch.input_ids[rows], "position_ids": batch.position_ids[rows]}
        | {"shift_labels": batch.shift_labels[rows]}
        for rows in (slice(0, 1), slice(1, 3))
    ]
    plugin = kd.attach(student, teacher, config)
    sides = plugin.sides
    sides["student"].isolation, sides["teacher"].isolation = "position_ids", "mask"
    each = [student(**inputs).loss for inputs in micro_batches]
    each[0].backward()  # the first step settles what is kept
    assert plugin.teacher_ahead(micro_batches)
    ahead = [student(**inputs).loss.item() for inputs in micro_batches]
    assert ahead == pytest.approx([loss.item() for loss in each], rel=1e-6)


def test_masks_are_put_back_after_a_forward_that_fails() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before, batch = dict(ALL_MASK_ATTENTION_FUNCTIONS.items()), packed_batch()
    model = make("opt", 1)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    with pytest.raises(RuntimeError, match="on purpose"), isolated(model.forward, "mask", inputs):
        assert dict(ALL_MASK_ATTENTION_FUNCTIONS.items()) != before
        raise RuntimeError("on purpose")
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS.items()) == before


def test_flash_attention_is_given_the_bounds_of_every_document() -> None:
    model, batch = make("llama", 1), packed_batch()
    model.config._attn_implementation_internal = "flash_attention_2"
    assert ways_of(model) == ("varlen", "position_ids")
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    with isolated(model.forward, "varlen", given) as inputs:
        bounds = inputs["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32 and bounds[-1] == batch.input_ids.numel() and inputs["max_length_k"] == 24
    assert torch.equal(inputs["cu_seq_lens_k"], bounds)
    flat = batch.input_ids.flatten()
    found = {tuple(flat[a:b].tolist()) for a, b in pairwise(bounds)}
    assert found >= {tuple(document.input_ids.tolist()) for document in make_documents()}


def test_bounds_go_over_the_sequences_of_several_micro_batches() -> None:
    """Under flash attention positions that start anew separate documents in batches of one only."""
    student, teacher = make("llama", 1), make("llama", 2)
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    batch = packed_batch().model_inputs()
    student(**batch).loss.backward()
    given: list[dict[str, Any]] = []
    backbone = teacher.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("cu_seq", "max_length"))}
        return backbone(*args, **kwargs)

    teacher.model.forward = watched
    teacher.config._attn_implementation_internal = "flash_attention_2"
    two = [{name: batch[name].clone() for name in ("input_ids", "position_ids")} for _ in range(2)]
    refused(lambda: plugin.teacher_ahead(two), "under flash attention")
    plugin.sides["teacher"].isolation = "varlen"
    teacher.model.config._attn_implementation_internal = "sdpa"  # there is no flash attention on a CPU
    assert plugin.teacher_ahead(two)
    bounds = given[-1]["cu_seq_lens_q"]
    assert bounds[-1] == 2 * batch["input_ids"].numel()
    assert len(bounds) == 1 + 2 * int((batch["position_ids"] == 0).sum())


def test_unequal_lengths_with_positions_do_not_go_together() -> None:
    student, teacher = make("llama", 1), make("llama", 2)
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    batch = packed_batch().model_inputs()
    student(**batch).loss.backward()
    two = [{name: batch[name][:, :length] for name in ("input_ids", "position_ids")} for length in (24, 20)]
    refused(lambda: plugin.teacher_ahead(two), "would join the documents", "together=1")
