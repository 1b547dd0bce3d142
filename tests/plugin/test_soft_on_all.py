"""`distill.soft_on: all` in an attached student: which tokens count in which loss, and what divides it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.data.isolated import IsolatedDataset
from kd_plugin.data.packing import Document, collate
from tests import oracle
from tests.loss_cases import config_of
from tests.refusals import refused
from tests.tiny_models import VOCAB, assert_same_gradients, gradients_of, make_batch, make_model

CONFIG = config_of("jsd", temperature=2.0, soft_on="all")
PADDED = [(0, 7), (0, 4), (3, 7)]
"""First and last token (excluded) of the three sequences of 7: whole, padded on the right, padded on the left."""

Pairs = list[tuple[int, int]]


def padded_batch() -> dict[str, Tensor]:
    """The second half of each sequence is labelled; padding has the id of a token that also occurs."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (start, stop) in enumerate(PADDED):
        mask[row, start:stop] = 1
        labels[row, (start + stop) // 2 : stop] = ids[row, (start + stop) // 2 : stop]
    return {"input_ids": ids.where(mask == 1, ids[0, 0]), "attention_mask": mask, "labels": labels}


def real_pairs(batch: dict[str, Tensor]) -> Pairs:
    """The rows (sequence, token) whose next token is real, too."""
    return [(row, s) for row, (start, stop) in enumerate(PADDED) for s in range(start, stop - 1)]


def dense(models: tuple[nn.Module, nn.Module], batch: dict[str, Tensor], pairs: Pairs, **items: Any) -> oracle.Expected:
    """Of both models' own logits; `pairs` are the rows of the soft loss."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    student = models[0](**given).logits[:, :-1]
    with torch.no_grad():
        teacher = models[1](**given).logits[:, :-1]
    mask = torch.zeros(student.shape[:2], dtype=torch.bool)
    for pair in pairs:
        mask[pair] = True
    flat = [x.flatten(0, 1) for x in (student, teacher, batch["labels"][:, 1:], mask)]
    return oracle.distill_logits(*flat[:3], CONFIG, soft_mask=flat[3], **items)


def make_pair(name: str = "llama") -> tuple[nn.Module, nn.Module]:
    return make_model(name, seed=1), make_model(name, seed=2, width=24)


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "gpt2"])
def test_prompts_count_in_the_soft_loss_and_padding_in_none(name: str) -> None:
    models, batch = make_pair(name), padded_batch()
    wanted = dense(models, batch, real_pairs(batch))
    assert wanted.num_valid == 6 + 3 + 3 and (batch["labels"][:, 1:] != -100).sum() < wanted.num_valid
    gradients = gradients_of(models[0], lambda: dense(models, batch, real_pairs(batch)).loss)
    plugin = kd.attach(*models, CONFIG)
    assert models[0](**batch).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    found = plugin.metrics()
    assert (found["valid_tokens"], found["trained_tokens"]) == (12, (batch["labels"][:, 1:] != -100).sum())
    for key, value in {"soft_loss": wanted.soft, "hard_loss": wanted.hard, **wanted.metrics}.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert found["loss"] == pytest.approx(0.7 * wanted.soft + 0.4 * wanted.hard, rel=1e-6)
    assert_same_gradients(gradients_of(models[0], lambda: models[0](**batch).loss), gradients, 1e-6)


def test_a_step_is_one_mean_over_its_micro_batches() -> None:
    models, batch = make_pair(), padded_batch()
    whole = dense(models, batch, real_pairs(batch))
    gradients = gradients_of(models[0], lambda: dense(models, batch, real_pairs(batch)).loss)
    plugin = kd.attach(*models, CONFIG)
    hard = int((batch["labels"][:, 1:] != -100).sum())
    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    for items in ((hard, 12), (torch.tensor(hard), torch.tensor(12))):
        given = {"num_items_in_batch": items[0], "soft_items_in_batch": items[1]}

        def step(given: dict[str, Any] = given) -> Tensor:
            return torch.stack([models[0](**part, **given).loss for part in parts]).sum()

        assert step().item() == pytest.approx(whole.loss.item(), rel=1e-6)
        assert_same_gradients(gradients_of(models[0], step), gradients, 1e-6)
    plugin.metrics()
    with torch.no_grad():
        step()
    assert plugin.metrics()["loss"] == pytest.approx(whole.loss.item(), rel=1e-6)


def test_a_batch_without_a_label_has_the_soft_loss_alone() -> None:
    models, batch = make_pair(), padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    wanted = dense(models, batch, real_pairs(batch))
    kd.attach(*models, CONFIG)
    assert models[0](**batch).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)


def packed() -> tuple[dict[str, Tensor], list[Document]]:
    """Three documents in one sequence of 16, and what they are."""
    generator = np.random.default_rng(1)
    lengths = (7, 5, 3)
    documents = [Document(generator.integers(3, VOCAB, n).astype(np.int32), generator.random(n) < 0.5) for n in lengths]
    dataset = IsolatedDataset(documents, 16, keep_tail=True, soft_on_all=True)
    batch = collate([dataset[0]])
    assert (batch.num_valid, batch.num_trained) == (6 + 4 + 2, sum(int(d.trained[1:].sum()) for d in documents))
    return batch.model_inputs(), documents


def one_by_one(models: tuple[nn.Module, nn.Module], documents: list[Document]) -> oracle.Expected:
    """Each document in a forward of its own."""
    logits, labels = ([], []), []
    for document in documents:
        ids = torch.from_numpy(document.input_ids).long()
        for model, found in zip(models, logits, strict=True):
            found.append(model(input_ids=ids[None]).logits[0, :-1])
        labels.append(torch.where(torch.from_numpy(document.trained[1:]), ids[1:], -100))
    every = torch.cat(labels)
    teachers = torch.cat(logits[1]).detach()
    return oracle.distill_logits(
        torch.cat(logits[0]), teachers, every, CONFIG, soft_mask=torch.ones_like(every, dtype=torch.bool)
    )


@pytest.mark.parametrize("name", ["llama", "qwen3_tied"])
def test_packed_documents_count_up_to_their_last_token(name: str) -> None:
    """Whether the rows are given, or found by positions and mask."""
    models = make_pair(name)
    inputs, documents = packed()
    wanted = one_by_one(models, documents)
    gradients = gradients_of(models[0], lambda: one_by_one(models, documents).loss)
    kd.attach(*models, CONFIG)
    by_positions = {name: value for name, value in inputs.items() if name != "loss_rows"}
    for given in (inputs, by_positions):
        assert models[0](**given).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
        assert_same_gradients(gradients_of(models[0], lambda given=given: models[0](**given).loss), gradients, 1e-6)


REFUSED = {
    "no mask": ({"attention_mask": None}, ("without attention_mask", "torch.ones_like(input_ids)", "loss_rows")),
    "a mask of four dimensions": ({"attention_mask": torch.ones(3, 1, 7, 7)}, ("attention_mask is (3, 1, 7, 7)",)),
    "bounds alone": ({"cu_seq_lens_q": torch.tensor([0, 7])}, ("cu_seq_lens_q without position_ids",)),
    "positions of images": ({"position_ids": torch.zeros(3, 3, 7).long()}, ("position_ids is (3, 3, 7)",)),
    "one number of items": ({"num_items_in_batch": 9}, ("num_items_in_batch is given without soft_items_in_batch",)),
    "the other number": ({"soft_items_in_batch": 9}, ("soft_items_in_batch is given without num_items_in_batch",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_known_is_refused(name: str) -> None:
    models, (changed, words) = make_pair(), REFUSED[name]
    kd.attach(*models, CONFIG)
    refused(lambda: models[0](**{**padded_batch(), **changed}), *words)


def test_students_that_do_not_predict_the_next_token_are_refused() -> None:
    for name in ("t5", "BertForMaskedLM"):
        models = make_pair(name)
        refused(
            lambda models=models: kd.attach(*models, CONFIG), "distill.soft_on", type(models[0]).__name__, "trained"
        )
        kd.attach(*models, CONFIG.model_copy(update={"soft_weight": 0.0}))


def test_a_soft_count_that_nothing_divides_by_is_refused() -> None:
    models = make_pair()
    kd.attach(*models, config_of())
    given = {**make_batch(), "num_items_in_batch": 9, "soft_items_in_batch": 9}
    refused(lambda: models[0](**given), "soft_items_in_batch is given without distill.soft_on all", "leave it out")


def test_a_loss_without_gradients_is_the_mean_over_this_batch() -> None:
    models, batch = make_pair(), padded_batch()
    wanted = dense(models, batch, real_pairs(batch))
    kd.attach(*models, CONFIG)
    with torch.no_grad():
        assert models[0](**batch).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)


def test_token_weights_multiply_both_losses() -> None:
    models, batch = make_pair(), padded_batch()
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(2))
    wanted = dense(models, batch, real_pairs(batch), token_weights=weights[:, :-1].flatten())
    kd.attach(*models, CONFIG)
    assert models[0](**batch, token_weights=weights).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
