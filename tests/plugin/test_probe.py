"""What a model shows in a small forward: what it does to its logits, at `attach` or once its weights have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.plugin import causal_lm, probe
from kd_plugin.row_kernels.row_pass import LogitTransform
from tests.loss_cases import config_of
from tests.tiny_models import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    assert_same_gradients,
    expected_loss,
    gradients_of,
    make_batch,
    make_model,
    with_changed_logits,
)
from tests.weights_later import later

SCALES_AND_CAPS = {
    "gemma2": LogitTransform(softcap=3.0),
    "gemma3": LogitTransform(softcap=4.0),
    "cohere": LogitTransform(scale=0.25),
    "granite": LogitTransform(scale=1 / 3),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_logits_are_the_head_of_the_backbone_transformed(name: str) -> None:
    model, batch = make_model(name), make_batch()
    inputs = {"input_ids": batch["input_ids"]}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = batch["input_ids"].flip(1)
    wanted = model(**inputs).logits
    slot = causal_lm.find_head(model, "student")
    head = slot.module
    hidden = causal_lm.run_backbone(slot, model.forward, inputs).hidden_states
    after = probe.observe(model, slot, "student").after_head
    assert after is not None
    assert slot.module is head is model.get_output_embeddings()
    bias = 0 if after.bias is None else after.bias
    torch.testing.assert_close(after.transform.apply(head(hidden) + bias), wanted, rtol=1e-6, atol=1e-6)
    declared = SCALES_AND_CAPS.get(name, LogitTransform())
    assert after.transform.scale == pytest.approx(declared.scale, rel=1e-5)
    assert after.transform.softcap == declared.softcap
    assert (after.bias is not None) == (name == "bart")


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "bart", "phi", "opt"])
def test_weights_that_come_after_attach_are_measured_in_the_first_forward(name: str) -> None:
    student, teacher, batch = make_model(name, seed=1), make_model(name, seed=2), make_batch()
    config = config_of("jsd", temperature=2.0)
    expected = expected_loss(student, teacher, batch, config).loss.item()
    wanted = gradients_of(student, lambda: expected_loss(student, teacher, batch, config).loss)
    bring = [later(model) for model in (student, teacher)]
    plugin = kd.attach(student, teacher, config)
    for model in bring:
        model()
    found = gradients_of(student, lambda: student(**batch).loss)
    assert_same_gradients(found, wanted, 1e-6)
    for _ in range(2):
        assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-6)
    plugin.detach()


def by_position(logits: Tensor) -> Tensor:
    return logits * torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype)[:, None]


def by_token_id(logits: Tensor) -> Tensor:
    return logits * torch.linspace(1, 2, logits.shape[2], dtype=logits.dtype)


@pytest.mark.parametrize("change", [by_position, by_token_id, lambda logits: logits.clamp(-1, 1)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_changed_in_another_way_are_refused(side: str, change: Callable[[Tensor], Tensor]) -> None:
    models = {"student": make_model("llama"), "teacher": make_model("llama")}
    with_changed_logits(models[side], change)
    with pytest.raises(ValueError, match=rf"the {side} \(LlamaForCausalLM\) changes its logits after the head"):
        kd.attach(models["student"], models["teacher"], config_of())


def test_a_gate_that_reads_the_hidden_states_is_refused() -> None:
    teacher = make_model("llama")
    seen: list[Tensor] = []
    teacher.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with_changed_logits(teacher, lambda logits: logits * (1 + seen[-1].mean(-1, keepdim=True).tanh()))
    with pytest.raises(ValueError, match="what depends on the position or on the hidden states"):
        kd.attach(make_model("llama"), teacher, config_of())


def test_a_trainable_scale_after_the_head_is_refused_for_the_student_only() -> None:
    def scaled() -> nn.Module:
        model = make_model("llama")
        model.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        return with_changed_logits(model, lambda logits: logits * model.temperature)

    with pytest.raises(ValueError, match="by trainable parameters, whose gradient would be lost"):
        kd.attach(scaled(), make_model("llama"), config_of())
    teacher, student, batch = scaled(), make_model("llama", seed=3), make_batch()
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    kd.attach(student, teacher, config_of())
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_trainable_bias_after_the_head_is_refused_also_where_it_shows_in_a_forward_only() -> None:
    """An evaluation cannot tell, so the first step that trains does."""
    student, teacher, batch = make_model("llama", seed=1), make_model("llama", seed=2), make_batch()
    student.bias = nn.Parameter(torch.linspace(-1, 1, 61, dtype=torch.float64))
    with_changed_logits(student, lambda logits: logits + student.bias)
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    bring = later(student)
    kd.attach(student, teacher, config_of())
    bring()
    with torch.no_grad():
        assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="by trainable parameters, whose gradient would be lost"):
        student(**batch)


def test_a_scale_and_a_bias_after_the_head_are_both_followed() -> None:
    bias = torch.randn(61, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = with_changed_logits(make_model("llama", seed=1), lambda logits: logits * 0.5 + bias)
    teacher = with_changed_logits(make_model("llama", seed=2), lambda logits: (logits + bias) * 3)
    batch = make_batch()
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    for model in (student, teacher):  # its own loss is of the logits before
        model.loss_function = lambda **kwargs: None
    kd.attach(student, teacher, config_of())
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_models_are_left_as_they_were() -> None:
    model = make_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    slot = causal_lm.find_head(model, "student")
    probe.observe(model, slot, "student")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with_changed_logits(model, by_position)
    with pytest.raises(ValueError, match="position"):
        probe.observe(model, slot, "student")
    assert [module.training for module in model.modules()] == modes


def test_what_a_forward_remembers_is_forgotten() -> None:
    """As the expert capacity that NLLB's router keeps from an evaluation."""
    model = make_model("llama").train()
    model.model.norm.register_buffer("seen", torch.zeros(1), persistent=False)
    model.model.norm.length, forward = 3, model.model.norm.forward

    def remembering(hidden: Tensor) -> Tensor:
        norm = model.model.norm
        norm.length, norm.fresh, norm.seen = hidden.shape[1], True, torch.ones(1)
        return forward(hidden)

    model.model.norm.forward = remembering
    probe.observe(model, causal_lm.find_head(model, "student"), "student")
    assert model.model.norm.length == 3 and not hasattr(model.model.norm, "fresh") and not model.model.norm.seen.any()


@pytest.fixture(params=[torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Another default dtype or device for the test's body."""
    dtype = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.parametrize("row_kernel", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_defaults_of_the_process_change_nothing(default: Any, row_kernel: str) -> None:
    student, teacher, batch = make_model("gemma2", seed=1), make_model("gemma2", seed=2), make_batch()
    config = config_of(row_kernel=row_kernel, chunk_size=5)
    expected = expected_loss(student, teacher, batch, config).loss.item()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    plugin = kd.attach(student, teacher, config)
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert plugin.metrics()["valid_tokens"] == 13


def test_a_model_that_cannot_run_on_a_few_tokens_is_measured_in_its_first_forward() -> None:
    student, teacher, batch = make_model("granite", seed=1), make_model("granite", seed=2), make_batch()
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    forward = teacher.forward

    def picky(input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] != batch["input_ids"].shape[1]:
            raise RuntimeError("another length was expected")
        return forward(input_ids=input_ids, **kwargs)

    teacher.forward = picky
    kd.attach(student, teacher, config_of())
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_under_spectral_norm_is_left_as_it_was(side: str) -> None:
    """Looking at it in training mode moves the vectors that it keeps."""
    models = {"student": make_model("llama", seed=1), "teacher": make_model("llama", seed=2)}
    head = torch.nn.utils.spectral_norm(models[side].lm_head)
    models[side].eval()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    kd.attach(models["student"], models["teacher"], config_of()).detach()
    after = models[side].get_output_embeddings().state_dict()
    assert {name: torch.equal(value, after[name]) for name, value in before.items()} == dict.fromkeys(before, True)
