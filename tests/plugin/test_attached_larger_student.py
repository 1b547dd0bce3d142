"""An attached student whose vocabulary is larger than its teacher's."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.settings.units import GIB
from tests.tiny_models import assert_same_gradients, gradients_of, make_model

EVERYTHING = {"temperature": 2.0, "label_smoothing": 0.1, "z_loss_weight": 0.02}


def attached_batch(length: int = 11) -> tuple[Tensor, Tensor]:
    """Inputs that both models embed; labels that the student alone knows among them."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, 4], labels[1, 7], labels[1, 2] = 70, 66, -100
    return ids, labels


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "phi", "cohere"])
def test_the_hard_loss_is_the_students_own(name: str) -> None:
    student, teacher = make_model(name, seed=1, vocab_size=71), make_model(name, seed=2, vocab_size=61)
    ids, labels = attached_batch()
    own = student(input_ids=ids, labels=labels).loss
    wanted = gradients_of(student, lambda: student(input_ids=ids, labels=labels).loss)
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    loss = student(input_ids=ids, labels=labels).loss
    metrics = plugin.metrics()
    assert metrics["hard_loss"] == pytest.approx(own.item(), rel=1e-6)  # its cross-entropy is fp32
    assert loss.item() == pytest.approx(0.5 * metrics["soft_loss"] + 0.5 * metrics["hard_loss"], rel=1e-12)
    assert metrics["logits_avoided_gib"] * GIB == 4 * 19 * (71 + 61)
    student.zero_grad()
    loss.backward()
    head = student.get_output_embeddings()
    head_name = next(n for n, p in student.named_parameters() if p is head.weight)
    torch.testing.assert_close(head.weight.grad[61:], 0.5 * wanted[head_name][61:], rtol=1e-5, atol=1e-8)
    plugin.detach()


def test_a_lora_adapter_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    ids, labels = attached_batch()

    def gradients_by(attach: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = make_model("llama", seed=1, vocab_size=71)
        teacher = make_model("llama", seed=2, vocab_size=61)
        adapter = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        student = peft.get_peft_model(student, adapter).double()
        config = kd.DistillConfig(divergence="jsd", row_kernel="eager", chunk_size=4, **EVERYTHING)
        if attach:
            kd.attach(student, teacher, config)
            return gradients_of(student, lambda: student(input_ids=ids, labels=labels).loss)
        targets = labels[:, 1:].reshape(-1)
        with torch.no_grad():
            of_teacher = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)

        def loss() -> Tensor:
            logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
            return kd.reference.distill_logits(logits, of_teacher, targets, config=config).loss

        return gradients_of(student, loss)

    assert_same_gradients(gradients_by(attach=True), gradients_by(attach=False), tolerance=1e-9)


def untrained(caplog: pytest.LogCaptureFixture, **changes: object) -> list[str]:
    """What `attach` and three steps warn of."""
    student, teacher = make_model("llama", seed=1, vocab_size=71), make_model("llama", seed=2, vocab_size=61)
    student.get_output_embeddings().requires_grad_(not changes.pop("frozen", False))
    if changes.pop("swapped", False):
        student, teacher = teacher, student
    settings = {"hard_weight": 0.0, "row_kernel": "eager", **changes}
    ids, _ = attached_batch()
    with caplog.at_level(logging.WARNING):
        plugin = kd.attach(student, teacher, kd.DistillConfig(**settings))
        for _ in range(3):
            student(input_ids=ids, labels=ids)
        plugin.detach()
    found, caplog.records[:] = [record.getMessage() for record in caplog.records], []
    return found


def test_token_ids_that_nothing_trains_are_said_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = untrained(caplog)
    for words in ("distill.hard_weight is 0", "71 token ids", "the teacher 61", "ids 61 to 70", "set hard_weight > 0"):
        assert words in message
    for changes in ({"hard_weight": 0.1}, {"frozen": True}, {"swapped": True}, {"divergence": "uld"}):
        assert untrained(caplog, **changes) == []


@pytest.mark.parametrize("label", [61, 70])
def test_loss_rows_may_point_at_labels_that_the_teacher_lacks_and_at_no_others(label: int) -> None:
    student, teacher = make_model("llama", seed=1, vocab_size=71), make_model("llama", seed=2, vocab_size=61)
    ids, _ = attached_batch()
    labels = torch.full_like(ids, -100)
    labels[0, 5] = label
    kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    given = student(input_ids=ids, labels=labels, loss_rows=torch.tensor([4])).loss
    assert given.item() == student(input_ids=ids, labels=labels).loss.item()
    labels[0, 5] = 71
    with pytest.raises(ValueError, match=r"labels\[0, 5\] is 71, but the student's vocabulary is 0 to 70"):
        student(input_ids=ids, labels=labels)
    with pytest.raises(ValueError, match="outside the vocabulary of 71"):
        student(input_ids=ids, labels=labels, loss_rows=torch.tensor([4]))
