"""Finding a model's head, what feeds it, and what happens to its logits; and refusing what cannot be distilled."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import kd_plugin as kd
from kd_plugin.plugin import causal_lm
from tests import refusals
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, make_batch, make_model


def test_the_backbone_runs_without_its_head() -> None:
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    slot = causal_lm.find_head(model, "student")
    hidden = causal_lm.run_backbone(slot, model.forward, {"input_ids": make_batch()["input_ids"]}).hidden_states
    assert hidden.shape == (2, 9, 32)


def test_the_head_is_back_in_place_when_the_backbone_fails() -> None:
    model = make_model("llama")
    slot, head = causal_lm.find_head(model, "student"), model.lm_head
    with pytest.raises(TypeError):
        causal_lm.run_backbone(slot, model.forward, {"input_ids": "text"})[0]
    assert model.lm_head is head


def refused(student: nn.Module, teacher: nn.Module | None, *words: str, **options: object) -> None:
    """attach refuses in one line with all `words`, and leaves both models as they were."""
    models = [model for model in (student, teacher) if model is not None]
    before = [{name: dict(m.__dict__) for name, m in model.named_modules()} for model in models]
    flags = [[p.requires_grad for p in model.parameters()] for model in models]
    config = options.pop("config", config_of())
    refusals.refused(lambda: kd.attach(student, teacher, config, **options), *words)
    assert [[p.requires_grad for p in model.parameters()] for model in models] == flags
    for model, modules in zip(models, before, strict=True):
        assert {name: m.__dict__.keys() for name, m in model.named_modules()} == {
            name: values.keys() for name, values in modules.items()
        }


def test_a_backbone_alone_is_refused() -> None:
    refused(make_model("llama").model, make_model("llama"), "student", "LlamaModel", "no output head", "AutoModel")
    refused(make_model("llama"), make_model("llama").model, "teacher", "LlamaModel", "no output head")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_is_not_linear_is_refused(side: str) -> None:
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    models[side].lm_head = nn.Sequential(nn.Linear(32, 61))
    refused(
        models["student"],
        models["teacher"],
        f"the {side}'s head is a torch.nn.modules.container.Sequential",
        "torch.nn.Linear",
    )


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_quantised_head_is_refused(side: str) -> None:
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    packed = torch.zeros(61, 32, dtype=torch.int8)
    models[side].lm_head.weight = nn.Parameter(packed, requires_grad=False)
    refused(models["student"], models["teacher"], f"the {side}'s head", "torch.int8 weights", "out of quantisation")


def clamp_logits_of(model: nn.Module) -> None:
    """What no scale, soft-cap or bias does."""
    forward = model.forward

    def clamp(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits.clamp(-1, 1)
        return output

    model.forward = clamp


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_changed_in_an_unknown_way_are_refused(side: str) -> None:
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    clamp_logits_of(models[side])
    words = (f"the {side} (LlamaForCausalLM) changes its logits", "scale, a tanh soft-cap or a bias", "DistillHead")
    refused(models["student"], models["teacher"], *words)


def test_no_teacher_though_the_soft_loss_wants_one() -> None:
    refused(make_model("llama"), None, "soft_weight is 0.7", "teacher is None", "soft_weight=0")


def test_a_model_that_is_to_teach_itself_is_refused() -> None:
    model = make_model("llama")
    refused(model, model, "student and teacher are one model", "copy.deepcopy")


def test_a_teacher_that_shares_trainable_parameters_is_refused() -> None:
    student, teacher = make_model("llama"), make_model("llama", seed=2)
    student.model.layers[0] = teacher.model.layers[0]
    refused(student, teacher, "share 9 parameter(s), such as model.layers.0", "copy.deepcopy")
    teacher.requires_grad_(False)
    kd.attach(student, teacher, config_of()).detach()  # frozen already, and so meant


def test_without_soft_loss_no_teacher_is_needed() -> None:
    student, batch = make_model("llama"), make_batch()
    wanted = student(**batch).loss.item()
    kd.attach(student, None, config_of(soft_weight=0, hard_weight=1))
    assert student(**batch).loss.item() == pytest.approx(wanted, rel=1e-6)


def test_without_soft_loss_a_teacher_is_neither_run_nor_touched() -> None:
    student, teacher = make_model("llama"), make_model("llama").train()
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    kd.attach(student, teacher, config_of(soft_weight=0))
    student(**make_batch()).loss.backward()
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


def test_embeddings_as_input_are_refused_when_a_teacher_must_read_them() -> None:
    student, batch = make_model("llama"), make_batch()
    kd.attach(student, make_model("llama"), config_of())
    with pytest.raises(ValueError, match="inputs_embeds, which the teacher cannot read: pass input_ids"):
        student(inputs_embeds=torch.randn(2, 9, 32).double(), labels=batch["labels"])


def test_labels_that_do_not_fit_the_inputs_are_refused() -> None:
    student, batch = make_model("llama"), make_batch()
    kd.attach(student, make_model("llama"), config_of())
    with pytest.raises(ValueError, match=r"targets \(2, 8\) do not match the rows \(2, 9\)"):
        student(input_ids=batch["input_ids"], labels=batch["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"labels\[0, 3\] is 61, but the student's vocabulary is 0 to 60"):
        student(input_ids=batch["input_ids"], labels=batch["labels"].masked_fill(batch["labels"] == -100, VOCAB))


def tokenizer_of(words: list[str]) -> object:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


def test_tokenizers_of_the_same_size_with_other_content_are_refused() -> None:
    pair = tokenizer_of(["<unk>", "a", "b"]), tokenizer_of(["<unk>", "b", "a"])
    words = ("differ at 2 of 3 ids", "id 1 is 'a' to the student and 'b' to the teacher")
    refused(make_model("llama"), make_model("llama"), *words, tokenizers=pair)


def test_equal_tokenizers_pass_and_additions_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    ours, larger = tokenizer_of(["<unk>", "a", "b"]), tokenizer_of(["<unk>", "a", "b", "c"])
    kd.attach(make_model("llama"), make_model("llama"), config_of(), tokenizers=(ours, ours))
    with caplog.at_level(logging.WARNING):
        kd.attach(make_model("llama"), make_model("llama"), config_of(), tokenizers=(ours, larger))
    assert "'c' (id 3, the teacher's)" in caplog.text
