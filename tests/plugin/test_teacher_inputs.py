"""A teacher that reads another text than its student: the loss is that of each conversation by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.data.packing import Batch, Document, collate
from kd_plugin.data.paired import PairedDataset
from tests import oracle
from tests.data_pairs import make_pairs
from tests.loss_cases import config_of
from tests.refusals import refused
from tests.tiny_models import VOCAB, assert_same_gradients, gradients_of, make_model

CONFIG = config_of("jsd", temperature=2.0, chunk_size=5)
NAMES = ("llama", "gpt2", "qwen3_tied")


def make_models(name: str) -> tuple[nn.Module, nn.Module]:
    sizes = {"dtype": torch.float32}
    return make_model(name, seed=1, **sizes), make_model(name, seed=2, width=24, **sizes)


def packed(documents: list[Document], seq_len: int = 24) -> Batch:
    dataset = PairedDataset(documents, seq_len, seed=2)
    return collate([dataset[index] for index in range(len(dataset))])


def one_by_one(models: tuple[nn.Module, nn.Module], documents: list[Document]) -> oracle.Expected:
    """Each conversation in forwards of its own, of the rows that predict an answer's token."""
    students, teachers, labels = [], [], []
    for document in documents:
        assert document.teacher is not None
        places = torch.from_numpy(document.trained.nonzero()[0])
        ids, theirs = (torch.from_numpy(x.input_ids).long()[None] for x in (document, document.teacher))
        students.append(models[0](input_ids=ids).logits[0, places - 1])
        with torch.no_grad():
            at = torch.from_numpy(document.teacher.at)[places]
            teachers.append(models[1](input_ids=theirs).logits[0, at - 1])
        labels.append(ids[0, places])
    return oracle.distill_logits(torch.cat(students), torch.cat(teachers), torch.cat(labels), CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_each_conversation_by_itself(name: str) -> None:
    models, documents = make_models(name), make_pairs()
    wanted = one_by_one(models, documents)
    gradients = gradients_of(models[0], lambda: one_by_one(models, documents).loss)
    plugin = kd.attach(*models, CONFIG)
    for side in plugin.sides.values():
        side.isolation = "position_ids"
    batch = packed(documents)
    assert len(batch.input_ids) > 1
    inputs = batch.model_inputs()
    assert models[0](**inputs).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    found = plugin.metrics()
    assert found["kl_t1"] == pytest.approx(wanted.metrics["kl_t1"], rel=1e-5)
    assert found["soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
    assert_same_gradients(gradients_of(models[0], lambda: models[0](**inputs).loss), gradients, 1e-5)
    without = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
    assert models[0](**without).loss.item() != pytest.approx(wanted.loss.item(), rel=1e-4)


def test_padded_sequences_of_other_lengths_will_do(name: str = "llama") -> None:
    models, documents = make_models(name), make_pairs()
    wanted = one_by_one(models, documents)
    kd.attach(*models, CONFIG)
    inputs = padded(documents)
    assert inputs["teacher_input_ids"].shape != inputs["input_ids"].shape
    assert models[0](**inputs).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)


def padded(documents: list[Document]) -> dict[str, Tensor]:
    """Each conversation in a row of its own, on the left; for the teacher on the right."""
    both = [[d.input_ids for d in documents], [d.teacher.input_ids for d in documents]]
    own, theirs = (torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64) for texts in both)
    masks = [torch.zeros_like(x) for x in (own, theirs)]
    labels, rows = torch.full_like(own, -100), torch.full_like(own, -1)
    for b, document in enumerate(documents):
        ids, other = (torch.from_numpy(x.input_ids).long() for x in (document, document.teacher))
        own[b, : len(ids)], masks[0][b, : len(ids)] = ids, 1
        start = theirs.shape[1] - len(other)
        theirs[b, start:], masks[1][b, start:] = other, 1
        for place in document.trained.nonzero()[0].tolist():
            labels[b, place] = ids[place]
            rows[b, place - 1] = b * theirs.shape[1] + start + int(document.teacher.at[place]) - 1
    positions = (masks[1].cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": own, "attention_mask": masks[0], "labels": labels, "teacher_rows": rows}
    return given | {"teacher_input_ids": theirs, "teacher_attention_mask": masks[1], "teacher_position_ids": positions}


@pytest.mark.parametrize("together", [1, 2, 4])
def test_the_teacher_may_read_ahead(together: int) -> None:
    models, documents = make_models("llama"), make_pairs()
    dataset = PairedDataset(documents, 24, seed=2)
    parts = [collate([dataset[index]]) for index in range(4)]
    items = sum(part.num_valid for part in parts)
    batches: list[dict[str, Any]] = [{**part.model_inputs(), "num_items_in_batch": items} for part in parts]
    plugin = kd.attach(*models, CONFIG)
    for side in plugin.sides.values():
        side.isolation = "position_ids"
    before = [models[0](**batch).loss.item() for batch in batches]
    calls: list[int] = []
    models[1].register_forward_hook(lambda *_: calls.append(1))
    assert plugin.teacher_ahead(batches, together)
    after = [models[0](**batch).loss.item() for batch in batches]
    assert after == pytest.approx(before, rel=1e-6) and len(calls) == 4 // together


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tokens without rows": ({"teacher_rows": None}, ("teacher_input_ids [B', S'] and teacher_rows [B, S] together",)),
    "rows without tokens": ({"teacher_input_ids": None}, ("found teacher_position_ids, teacher_rows",)),
    "rows of another shape": ({"teacher_rows": torch.zeros(2, 3).long()}, ("teacher_rows is torch.int64 (2, 3)",)),
    "bounds of the student": ({"cu_seq_lens_q": torch.zeros(2).int()}, ("cu_seq_lens_q", "about its own tokens")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused(name: str) -> None:
    models, (changed, words) = make_models("llama"), REFUSED[name]
    kd.attach(*models, CONFIG)
    refused(lambda: models[0](**{**packed(make_pairs()).model_inputs(), **changed}), *words)


def test_rows_that_predict_another_token_are_refused() -> None:
    models = make_models("llama")
    kd.attach(*models, CONFIG)
    inputs = packed(make_pairs()).model_inputs()
    first = int(inputs["loss_rows"][0])
    for wrong in (-1, inputs["teacher_rows"].max().item() + 1000):
        rows = inputs["teacher_rows"].clone()
        rows.view(-1)[first] = wrong
        refused(lambda rows=rows: models[0](**{**inputs, "teacher_rows": rows}), f"row {first} with label", f"{wrong}")
    moved = inputs["teacher_rows"] + (inputs["teacher_rows"] >= 0).long()
    refused(lambda: models[0](**{**inputs, "teacher_rows": moved}), "whose next token is that label", "before token")


def test_ids_that_the_teacher_lacks_are_named_as_its_own() -> None:
    models, inputs = make_models("llama"), padded(make_pairs())
    kd.attach(*models, CONFIG)
    inputs["teacher_input_ids"][0, 0] = VOCAB
    refused(lambda: models[0](**inputs), f"is {VOCAB}", "the teacher embeds ids 0 to")


def test_all_tokens_and_another_text_exclude_each_other() -> None:
    models = make_models("llama")
    kd.attach(*models, CONFIG.model_copy(update={"soft_on": "all"}))
    refused(lambda: models[0](**padded(make_pairs())), "soft_on is all", "teacher_input_ids")


def test_without_a_soft_loss_or_labels_the_teachers_inputs_are_passed_over() -> None:
    models, inputs = make_models("llama"), padded(make_pairs())
    kd.attach(*models, config_of(soft_weight=0))
    assert models[0](**inputs).loss.isfinite()
    del inputs["labels"]
    assert models[0](**inputs).logits.shape[:2] == inputs["input_ids"].shape
