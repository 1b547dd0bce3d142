"""Which row a label belongs to, and what a decoder reads: as the student's own loss has it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.plugin import labels as conventions
from tests import oracle
from tests.loss_cases import config_of
from tests.tiny_models import assert_same_gradients, gradients_of, make_batch, make_model

VOCAB = 61
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
BERT |= {"max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {**TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40, "dropout": 0.0}
T5 = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
T5 |= {"dropout_rate": 0.0}
XLNET = {**TOKENS, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "dropout": 0.0}

# class -> settings of its configuration; whether its own loss shifts labels
CLASSES: dict[str, tuple[dict[str, Any], bool]] = {
    "BertForMaskedLM": (BERT, False),
    "BertLMHeadModel": ({**BERT, "is_decoder": True}, True),
    "RobertaForMaskedLM": (BERT, False),
    "BartForCausalLM": (BART, False),
    "MBartForCausalLM": (BART, False),
    "XLNetLMHeadModel": (XLNET, False),
    "BartForConditionalGeneration": (BART, False),
    "MBartForConditionalGeneration": (BART, False),
    "PLBartForConditionalGeneration": (BART, False),
    "T5ForConditionalGeneration": (T5, False),
    "GPT2LMHeadModel": ({**TOKENS, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}, True),
}


def model_of(name: str, seed: int, **settings: Any) -> nn.Module:
    kind = getattr(T, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(kind.config_class(**{**CLASSES[name][0], **settings}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.mark.parametrize("name", CLASSES)
def test_the_hard_loss_is_the_models_own(name: str) -> None:
    student, batch = model_of(name, seed=1), make_batch()
    own = student(**batch).loss.item()
    wanted = gradients_of(student, lambda: student(**batch).loss)
    kd.attach(student, None, config_of(soft_weight=0.0, hard_weight=1.0))
    assert student(**batch).loss.item() == pytest.approx(own, rel=1e-6)  # Transformers computes it in fp32
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), wanted, 1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_the_loss_is_that_of_the_models_own_logits_by_row(name: str) -> None:
    student, teacher, batch = model_of(name, seed=1), model_of(name, seed=2), make_batch()
    config = config_of("forward_kl", temperature=2.0)

    def dense() -> Tensor:
        z, v = student(**batch).logits, teacher(**batch).logits.detach()
        targets = batch["labels"]
        if CLASSES[name][1]:
            z, v, targets = z[:, :-1], v[:, :-1], targets[:, 1:]
        return oracle.distill_logits(z.flatten(0, 1), v.flatten(0, 1), targets.flatten(), config).loss

    expected, wanted = dense().item(), gradients_of(student, dense)
    kd.attach(student, teacher, config)
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), wanted, 1e-6)


def test_decoder_inputs_by_hand() -> None:
    labels = torch.tensor([[7, 8, 2, 40], [9, 2, 41, -100]])  # 40, 41: language codes
    start = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 41]])
    wrapped = torch.tensor([[40, 7, 8, 2], [41, 9, 2, 41]])
    for name, wanted in (("T5ForConditionalGeneration", start), ("MBartForConditionalGeneration", wrapped)):
        model = model_of(name, seed=1)
        for way, make in conventions.DECODER_INPUTS.items():
            if (way == "last token wrapped") == (name[0] == "M") and not way.startswith(("start", "_")):
                assert torch.equal(make(model, labels), wanted), way


def test_another_ignore_index_does_not_reach_the_decoder() -> None:
    student, batch = model_of("MBartForConditionalGeneration", seed=1), make_batch()
    own = student(**batch).loss.item()
    kd.attach(student, None, config_of(soft_weight=0.0, hard_weight=1.0, ignore_index=-7))
    batch["labels"][batch["labels"] == -100] = -7
    assert student(**batch).loss.item() == pytest.approx(own, rel=1e-6)  # Transformers computes it in fp32


def with_loss(model: nn.Module, loss: Any) -> nn.Module:
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: loss(logits, labels)
    return model


def test_a_student_whose_own_loss_is_another_is_refused() -> None:
    def shifted_by_two(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())

    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    for loss in (shifted_by_two, total):
        student = with_loss(make_model("llama"), loss)
        with pytest.raises(ValueError, match="the own loss of LlamaForCausalLM is not the mean cross-entropy"):
            kd.attach(student, make_model("llama"), config_of())
        assert "forward" not in student.__dict__


def test_a_loss_of_its_own_is_followed_whatever_the_class() -> None:
    """By what it computes: a Llama whose loss does not shift is a masked language model."""

    def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    student, batch = with_loss(make_model("llama"), unshifted), make_batch()
    own = student(**batch).loss.item()
    kd.attach(student, None, config_of(soft_weight=0.0, hard_weight=1.0))
    assert student(**batch).loss.item() == pytest.approx(own, rel=1e-6)  # Transformers computes it in fp32


def test_a_student_without_a_loss_of_its_own_is_read_as_its_kind_and_that_is_said(caplog: Any) -> None:
    class NoLoss(T.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    plain, batch = make_model("llama"), make_batch()
    own = plain(**batch).loss.item()
    student = NoLoss(plain.config).double().eval()
    student.load_state_dict(plain.state_dict())
    # Not one of Transformers' own, so that no table speaks for it
    NoLoss.__mro__[1].__module__, home = "elsewhere", NoLoss.__mro__[1].__module__
    try:
        with caplog.at_level(logging.WARNING):
            kd.attach(student, None, config_of(soft_weight=0.0, hard_weight=1.0))
    finally:
        NoLoss.__mro__[1].__module__ = home
    assert "row s is taken to predict labels[s + 1]" in caplog.text
    assert student(**batch).loss.item() == pytest.approx(own, rel=1e-6)  # Transformers computes it in fp32


def test_models_that_predict_different_places_are_refused() -> None:
    with pytest.raises(ValueError, match="the student predicts the token after it and the teacher the token at the pl"):
        kd.attach(model_of("BertLMHeadModel", seed=1), model_of("BertForMaskedLM", seed=2), config_of())


def test_the_table_speaks_for_no_class_that_computes_otherwise() -> None:
    """Without weights: a subclass with a forward of its own, an instance with a loss of its own."""

    class Own(T.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    plain, batch = make_model("llama"), make_batch()
    for own in (Own, T.LlamaForCausalLM):
        with torch.device("meta"):
            model = own(plain.config).double()
        if own is T.LlamaForCausalLM:
            model.loss_function = lambda **kwargs: torch.zeros(())
        kd.attach(model, make_model("llama", seed=2), config_of())
        model.to_empty(device="cpu").load_state_dict(plain.state_dict())
        model.model.rotary_emb.inv_freq.copy_(plain.model.rotary_emb.inv_freq)
        with pytest.raises(ValueError, match="is not known"):
            model(**batch)


def test_an_unknown_convention_wants_labels_by_row() -> None:
    class Own(T.LlamaForCausalLM):
        pass

    student, teacher, batch = make_model("llama", seed=1), make_model("llama", seed=2), make_batch()
    expected = kd.attach(student, teacher, config_of())
    wanted = student(**batch).loss.item()
    expected.detach()
    weights = student.state_dict()
    with torch.device("meta"):
        own = Own(student.config).double()
    T.LlamaForCausalLM.__module__, home = "elsewhere", T.LlamaForCausalLM.__module__
    try:
        kd.attach(own, teacher, config_of())
    finally:
        T.LlamaForCausalLM.__module__ = home
    own.to_empty(device="cpu").load_state_dict(weights)
    own.model.rotary_emb.inv_freq.copy_(student.model.rotary_emb.inv_freq)
    with pytest.raises(ValueError, match=r"which row a label of Own belongs to is not known .*pass shift_labels"):
        own(**batch)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert own(input_ids=batch["input_ids"], shift_labels=shifted).loss.item() == pytest.approx(wanted, rel=1e-9)
