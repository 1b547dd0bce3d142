"""The router loss of a mixture of experts: the model's own, weighted by valid tokens, whatever the split."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import kd_plugin as kd
from tests.experts import COEFFICIENT, MIXTURES, VOCAB, make_batch, make_mixture
from tests.tiny_models import assert_same_gradients, gradients_of, make_model

ALONE = kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, row_kernel="eager")
FULL = {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}


def plain_parts(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """(cross-entropy sum, weighted router loss, valid tokens) of a plain causal mixture, by its own outputs."""
    output = model(**batch)
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    valid = int((targets != -100).sum())
    return F.cross_entropy(logits, targets, reduction="sum"), COEFFICIENT * output.aux_loss, valid


def weighted_mean(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """(loss of the whole step, its router part): every micro-batch's router loss weighs its valid tokens."""
    hard, routers, valid = zip(*(plain_parts(model, batch) for batch in batches), strict=True)
    router = sum(loss * count for loss, count in zip(routers, valid, strict=True)) / sum(valid)
    return sum(hard) / sum(valid) + router, router


def num_items(batches: list[dict[str, Tensor]]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_adds_what_it_adds_by_itself(name: str) -> None:
    model, batch = make_mixture(name), make_batch(2)
    extra = {"output_router_logits": True} if name.startswith("Switch") else {}  # which reads no configuration
    wanted = gradients_of(model, lambda: model(**batch, **extra).loss)
    with torch.no_grad():
        own = model(**batch, **extra).loss
        without = model(**batch, output_router_logits=False).loss
    assert abs(float(own - without)) > 0.1  # else the test could not fail
    plugin = kd.attach(model, None, ALONE)
    torch.testing.assert_close(model(**batch, **extra).loss.detach(), own, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients_of(model, lambda: model(**batch, **extra).loss), wanted, 2e-5)
    assert plugin.metrics()["router_loss"] == pytest.approx(float(own - without), rel=1e-5)


def test_the_flag_may_stand_in_the_text_configuration() -> None:
    small = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**small, "vocab_size": VOCAB, "num_hidden_layers": 1, "head_dim": 8, "moe_intermediate_size": 16}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    vision = {"hidden_size": 32, "intermediate_size": 24, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model, batch = transformers.Qwen3VLMoeForConditionalGeneration(config).eval(), make_batch()
    own = model(**batch).loss.detach()
    assert abs(float(own - model(**batch, output_router_logits=False).loss.detach())) > 0.1
    kd.attach(model, None, ALONE)
    torch.testing.assert_close(model(**batch).loss.detach(), own)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_micro_batches_add_up_to_the_mean_over_valid_tokens(name: str) -> None:
    model, batches = make_mixture(name), [make_batch(seed, rows=1) for seed in range(4)]
    wanted = gradients_of(model, lambda: weighted_mean(model, batches)[0])
    loss, router = (value.item() for value in weighted_mean(model, batches))
    plugin, items = kd.attach(model, None, ALONE), num_items(batches)

    def step() -> Tensor:
        return sum(model(**batch, num_items_in_batch=items).loss for batch in batches)

    assert step().item() == pytest.approx(loss, rel=1e-5)
    plugin.metrics()
    assert_same_gradients(gradients_of(model, step), wanted, 2e-5)
    found = plugin.metrics()
    assert found["router_loss"] == pytest.approx(router, rel=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["loss"] == pytest.approx(found["hard_loss"] + found["router_loss"], rel=1e-6)


def test_any_split_of_one_sequence_repeated_is_the_same_step() -> None:
    model, single = make_mixture("Qwen3MoeForCausalLM"), make_batch(3, rows=1)
    four = {name: value.repeat(4, 1) for name, value in single.items()}
    wanted = gradients_of(model, lambda: model(**four).loss)  # Transformers' own, of the whole step at once
    kd.attach(model, None, ALONE)
    items = num_items([four])
    whole = gradients_of(model, lambda: model(**four, num_items_in_batch=items).loss)
    parts = gradients_of(model, lambda: sum(model(**single, num_items_in_batch=items).loss for _ in range(4)))
    assert_same_gradients(whole, wanted, 2e-5)
    assert_same_gradients(parts, wanted, 2e-5)


def test_distillation_leaves_the_router_loss_its_own_weight() -> None:
    """Neither soft_weight nor hard_weight nor the temperature touches it."""
    batch = make_batch(1)
    model, teacher = make_mixture("Qwen3MoeForCausalLM"), make_mixture("MixtralForCausalLM", seed=2)
    router = plain_parts(model, batch)[1].item()
    config = kd.DistillConfig(soft_weight=0.3, hard_weight=0.2, temperature=3.0, row_kernel="eager")
    plugin = kd.attach(model, teacher, config)
    loss = model(**batch).loss.item()
    found = plugin.metrics()
    assert found["router_loss"] == pytest.approx(router, rel=1e-5)
    assert loss == pytest.approx(0.3 * found["soft_loss"] + 0.2 * found["hard_loss"] + router, rel=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_micro_batch_without_valid_tokens_weighs_nothing_and_keeps_the_graph(padded: bool) -> None:
    """`padded`: nor any token to attend to, of which Transformers' router loss is NaN."""
    model, batch = make_mixture("Qwen3MoeForCausalLM"), make_batch()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    empty["attention_mask"] = torch.zeros_like(batch["labels"]) if padded else torch.ones_like(batch["labels"])
    if padded:
        assert model(**empty).aux_loss.isnan()
    wanted = gradients_of(model, lambda: weighted_mean(model, [batch])[0])
    plugin, items = kd.attach(model, None, ALONE), num_items([batch])
    nothing = model(**empty, num_items_in_batch=items).loss
    assert nothing.item() == 0.0
    nothing.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    plugin.metrics()
    found = gradients_of(model, lambda: sum(model(**part, num_items_in_batch=items).loss for part in (batch, empty)))
    assert_same_gradients(found, wanted, 2e-5)
    alone = plugin.metrics()
    model(**batch, num_items_in_batch=items)
    assert alone["router_loss"] == pytest.approx(plugin.metrics()["router_loss"], rel=1e-6)
    assert model(**empty).loss.item() == 0.0  # counted here


def test_without_gradients_the_loss_is_the_models_own() -> None:
    model, batch = make_mixture("MixtralForCausalLM"), make_batch(4)
    own, router = model(**batch).loss.item(), plain_parts(model, batch)[1].item()
    plugin = kd.attach(model, None, ALONE)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(own, rel=1e-5)
        assert model(**batch).loss.item() == pytest.approx(own, rel=1e-5)
    assert plugin.metrics()["router_loss"] == pytest.approx(router, rel=1e-5)


def test_a_window_without_a_forward_and_a_dense_model_have_no_router_loss_of_their_own() -> None:
    model, batch = make_model("llama", vocab_size=VOCAB, dtype=torch.float32).train(), make_batch()
    plugin = kd.attach(model, None, ALONE)
    model(**batch).loss.backward()
    assert "router_loss" not in plugin.metrics()
    quiet = make_mixture("MixtralForCausalLM", output_router_logits=False)
    plugin, own = kd.attach(quiet, None, ALONE), quiet(**batch).loss.item()
    torch.testing.assert_close(quiet(**batch).loss.item(), own)
    assert "router_loss" not in plugin.metrics()


class OfItsOwn(transformers.LlamaForCausalLM):
    """A model from elsewhere, which always adds a loss, by a name and a coefficient of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **kwargs)
        balance = self.model.layers[0].mlp.up_proj.weight.square().mean()
        output["balance_loss"] = balance
        if labels is not None:
            output["loss"] = output.loss + 3.0 * balance
        return output


def test_a_loss_that_a_model_names_otherwise_is_added_as_it_adds_it() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model, batch = OfItsOwn(config), make_batch()
    wanted = gradients_of(model, lambda: model(**batch).loss)
    kd.attach(model, None, ALONE)
    for _ in range(2):  # learnt in the first forward, known in the second
        assert_same_gradients(gradients_of(model, lambda: model(**batch).loss), wanted, 2e-5)


def test_an_output_asked_for_as_a_tuple_loses_no_router_loss() -> None:
    model, batch = make_mixture("MixtralForCausalLM"), make_batch()
    own = model(**batch).loss.item()
    kd.attach(model, None, ALONE)
    assert model(**batch, return_dict=False).loss.item() == pytest.approx(own, rel=1e-5)


def test_a_flag_that_the_model_does_not_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make_mixture("SwitchTransformersForConditionalGeneration"), make_batch()
    model.config.output_router_logits = True
    own = model(**batch).loss.item()
    kd.attach(model, None, ALONE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert model(**batch).loss.item() == pytest.approx(own, rel=1e-5)
    said = [record.message for record in caplog.records if "output_router_logits" in record.message]
    assert len(said) == 1 and "SwitchTransformersForConditionalGeneration" in said[0]


@pytest.mark.parametrize("name", ["router_labels", "next_sentence_label", "entity_labels", "return_loss"])
def test_labels_of_another_loss_are_refused_by_name(name: str) -> None:
    model, batch = make_mixture("MixtralForCausalLM"), make_batch()
    kd.attach(model, None, ALONE)
    with pytest.raises(ValueError, match=name):
        model(**batch, **{name: torch.zeros(2, dtype=torch.int64)})


def test_a_loss_of_the_logits_that_a_model_adds_is_refused_by_name() -> None:
    model, batch = make_mixture("MixtralForCausalLM"), make_batch()
    plugin = kd.attach(model, None, ALONE)
    model.config.z_loss_coefficient = 1e-3  # as Bamba's
    with pytest.raises(ValueError, match=r"z_loss_coefficient.*z_loss_weight"):
        model(**batch)
    plugin.detach()
    with pytest.raises(ValueError, match=r"z_loss_coefficient.*z_loss_weight"):
        kd.attach(model, None, ALONE)


def test_the_teachers_router_loss_is_nobodys() -> None:
    batch = make_batch()
    model = make_mixture("MixtralForCausalLM", output_router_logits=False)
    teacher = make_mixture("Qwen3MoeForCausalLM", seed=2)
    plugin = kd.attach(model, teacher, kd.DistillConfig(row_kernel="eager"))
    loss = model(**batch).loss.item()
    found = plugin.metrics()
    assert "router_loss" not in found
    assert loss == pytest.approx(0.5 * found["soft_loss"] + 0.5 * found["hard_loss"], rel=1e-5)


def test_a_dense_teacher_is_not_asked_for_router_logits() -> None:
    model, batch = make_mixture("MixtralForCausalLM"), make_batch()
    teacher = make_model("gpt2", vocab_size=VOCAB, dtype=torch.float32).train()
    seen: list[SimpleNamespace] = []
    original = teacher.transformer.forward
    teacher.transformer.forward = lambda *args, **kwargs: (seen.append(kwargs), original(*args, **kwargs))[1]
    kd.attach(model, teacher, kd.DistillConfig(row_kernel="eager"))
    model(**batch, output_router_logits=True).loss.backward()
    assert seen and all("output_router_logits" not in kwargs for kwargs in seen)


class AddsUnnamed(transformers.LlamaForCausalLM):
    """Likewise, under no name at all."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output["loss"] = output.loss + 0.5 * self.model.layers[0].mlp.up_proj.weight.square().mean()
        return output


def test_a_loss_that_a_model_adds_under_no_name_is_added_too() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model, batch = AddsUnnamed(config), make_batch()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(20)
    own, wanted = model(**batch).loss.item(), gradients_of(model, lambda: model(**batch).loss)
    kd.attach(model, None, ALONE)
    assert model(**batch).loss.item() == pytest.approx(own, rel=1e-5)
    assert_same_gradients(gradients_of(model, lambda: model(**batch).loss), wanted, 2e-5)
