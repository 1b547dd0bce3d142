"""attach and detach: the student's loss becomes the distillation loss, and everything else stays as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests.allocations import NewTensors
from tests.loss_cases import config_of
from tests.tiny_models import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    TIED,
    VOCAB,
    assert_same_gradients,
    expected_loss,
    gradients_of,
    make_batch,
    make_model,
)

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture
def pair() -> Pair:
    return make_model("llama", seed=1), make_model("llama", seed=2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_the_models_own_logits(name: str, temperature: float) -> None:
    student, teacher = make_model(name, seed=1), make_model(name, seed=2)
    config, batch = config_of("jsd", temperature=temperature), make_batch()
    expected = expected_loss(student, teacher, batch, config)
    assert expected.soft > 0.01  # otherwise the soft part could be anything
    wanted = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    keys = list(student.state_dict())

    plugin = kd.attach(student, teacher, config)
    assert list(student.state_dict()) == keys
    assert student(**batch).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    found = gradients_of(student, lambda: student(**batch).loss)
    # Norms and rotary embeddings compute in fp32 whatever the model's precision.
    assert_same_gradients(found, wanted, tolerance=1e-6)
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    assert (embedding.weight is head.weight) == (name in TIED)
    plugin.detach()
    assert list(student.state_dict()) == keys


@pytest.mark.parametrize(("name", "teacher_name"), [("llama", "gemma2"), ("granite", "phi"), ("gpt2", "cohere")])
def test_models_of_different_families_keep_their_own_logit_transforms(name: str, teacher_name: str) -> None:
    student, teacher = make_model(name, seed=1), make_model(teacher_name, seed=2, vocab_size=VOCAB + 3)
    config, batch = config_of("reverse_kl", temperature=2.0), make_batch()
    wanted = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    kd.attach(student, teacher, config)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), wanted, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    student, teacher = make_model("llama", seed=1, dtype=dtype), make_model("llama", seed=2, dtype=dtype)
    config, batch = config_of("forward_kl", temperature=2.0), make_batch()
    expected = expected_loss(student, teacher, batch, config).loss.item()
    kd.attach(student, teacher, config)
    loss = student(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    # the model rounds its own logits to bf16, the plugin does not
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert student.lm_head.weight.grad.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "t5"])
def test_without_labels_nothing_changes(name: str) -> None:
    student, teacher = make_model(name, seed=1), make_model(name, seed=2)
    batch = make_batch()
    inputs = {"input_ids": batch["input_ids"]}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = batch["input_ids"]
    logits = student(**inputs).logits
    generation = {"max_new_tokens": 4, "do_sample": False}
    tokens = student.generate(batch["input_ids"], **generation)
    theirs = teacher.generate(batch["input_ids"], **generation)
    plugin = kd.attach(student, teacher, config_of())
    assert torch.equal(student(**inputs).logits, logits)
    assert torch.equal(student.generate(batch["input_ids"], **generation), tokens)
    assert torch.equal(teacher.generate(batch["input_ids"], **generation), theirs)
    plugin.detach()
    assert torch.equal(student(**inputs).logits, logits)


def test_detach_gives_both_models_back(pair: Pair) -> None:
    student, teacher = pair
    teacher.train()
    teacher.model.layers[0].eval()
    teacher.model.norm.weight.requires_grad_(False)
    head, teacher_head = student.lm_head, teacher.lm_head
    own = [dict(module.__dict__) for module in (student, teacher, head, teacher_head)]
    modes = [module.training for module in teacher.modules()]
    trainable = [p.requires_grad for p in teacher.parameters()]
    plugin = kd.attach(student, teacher, config_of())
    assert student.lm_head is not head and isinstance(student.lm_head, kd.DistillHead)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    plugin.detach()
    plugin.detach()
    assert student.lm_head is head and student.get_output_embeddings() is head
    assert [p.requires_grad for p in teacher.parameters()] == trainable
    assert [module.training for module in teacher.modules()] == modes
    for module, before in zip((student, teacher, head, teacher_head), own, strict=True):
        assert module.__dict__.keys() == before.keys()
    assert "loss" in student(**make_batch()) and student(**make_batch()).logits is not None


def test_a_student_that_recomputes_its_activations(pair: Pair) -> None:
    student, teacher = pair
    batch, config = make_batch(), config_of()
    wanted = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    student.train()
    student.activation_checkpointing_enable()
    kd.attach(student, teacher, config)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), wanted, tolerance=1e-6)


def test_attach_again_after_detach(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    losses = []
    for _ in range(2):
        plugin = kd.attach(student, teacher, config_of())
        losses.append(student(**batch).loss.item())
        plugin.detach()
    assert losses[0] == losses[1]


def test_attaching_twice_is_refused(pair: Pair) -> None:
    plugin = kd.attach(*pair, config_of())
    with pytest.raises(ValueError, match="attached already: call plugin"):
        kd.attach(*pair, config_of())
    assert pair[0](**make_batch()).loss.isfinite()
    plugin.detach()


def test_inputs_may_be_positional(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0
    kd.attach(student, teacher, config_of())
    by_name = student(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
    assert student(batch["input_ids"], mask, labels=batch["labels"]).loss.item() == by_name.item()
    assert student(**batch).loss.item() != by_name.item()  # the mask reaches the models


def test_rows_counted_on_the_host_change_nothing(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    targets = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
    rows = (targets != -100).nonzero().squeeze(1)
    kd.attach(student, teacher, config_of())
    counted = gradients_of(student, lambda: student(**batch).loss)
    given = gradients_of(student, lambda: student(**batch, loss_rows=rows).loss)
    assert student(**batch, loss_rows=rows).loss.item() == student(**batch).loss.item()
    assert_same_gradients(given, counted, tolerance=0)


def test_labels_may_be_shifted_already(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    kd.attach(student, teacher, config_of())
    wanted = student(**batch).loss.item()
    assert student(input_ids=batch["input_ids"], shift_labels=shifted).loss.item() == wanted


@pytest.mark.parametrize("num_items", [29, torch.tensor(29)])
def test_num_items_in_batch_divides_the_sum(pair: Pair, num_items: int | Tensor) -> None:
    student, teacher = pair
    batch = make_batch()
    valid = int((batch["labels"][:, 1:] != -100).sum())
    kd.attach(student, teacher, config_of())
    mean = gradients_of(student, lambda: student(**batch).loss)
    part = gradients_of(student, lambda: student(**batch, num_items_in_batch=num_items).loss)
    assert_same_gradients(part, {name: grad * valid / 29 for name, grad in mean.items()}, tolerance=1e-6)


def test_token_weights_weigh_rows(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    kd.attach(student, teacher, config_of())
    plain = student(**batch).loss.item()
    assert student(**batch, token_weights=torch.full((2, 9), 3.0)).loss.item() == pytest.approx(3 * plain)
    assert student(**batch, token_weights=torch.zeros(2, 9)).loss.item() == 0


def test_a_batch_without_labels_to_learn_from(pair: Pair) -> None:
    student, teacher = pair
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    plugin = kd.attach(student, teacher, config_of())
    grads = gradients_of(student, lambda: student(**batch).loss)
    assert grads.keys() == dict(student.named_parameters()).keys()
    assert not any(grad.any() for grad in grads.values())
    assert plugin.metrics()["valid_tokens"] == 0 and plugin.metrics()["loss"] == 0


def test_the_loss_in_training_never_holds_tokens_times_vocabulary() -> None:
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32, vocab_size=2003) for seed in (1, 2))
    batch = make_batch(rows=4, length=30)
    kd.attach(student, teacher, config_of(chunk_size=8))
    student.train()
    with NewTensors() as made:
        student(**batch).loss.backward()
    assert 120 * 2003 > 2003 * 32 > 8 * 2003
    assert max(made.numels.values()) == 2003 * 32
    with NewTensors() as made, torch.no_grad():
        student(**batch)
    assert max(made.numels.values()) <= 8 * 2003


def test_gradients_are_not_computed_under_no_grad(pair: Pair) -> None:
    student, teacher = pair
    kd.attach(student, teacher, config_of())
    with torch.no_grad(), NewTensors() as made:
        loss = student(**make_batch()).loss
    assert not loss.requires_grad and loss.isfinite()
    assert (VOCAB, 32) not in made.shapes


@pytest.fixture
def random_state() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bart"])
def test_attaching_consumes_no_random_numbers(name: str, random_state: None) -> None:
    student, teacher = make_model(name, seed=1).train(), make_model(name, seed=2).train()
    before, python_before = torch.get_rng_state(), random.getstate()
    kd.attach(student, teacher, config_of())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    assert student.training and not teacher.training


def test_dropout_of_the_student_stays_and_the_teachers_is_off() -> None:
    student, teacher = (make_model("gpt2", seed=seed, dropout=0.1).train() for seed in (1, 2))
    batch = make_batch()
    plugin = kd.attach(student, teacher, config_of(hard_weight=0))
    torch.manual_seed(5)
    first = student(**batch).loss.item()
    entropy = plugin.metrics()["teacher_entropy"]
    assert student(**batch).loss.item() != first
    assert plugin.metrics()["teacher_entropy"] == entropy
