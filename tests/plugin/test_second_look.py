"""What a model does in training mode only, or at padding and the like only, is followed or refused, never lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.plugin.replaced_forward import is_patched
from tests.loss_cases import config_of
from tests.sweep.batches import text
from tests.sweep.shrink import small_model
from tests.tiny_models import (
    ENCODER_DECODERS,
    assert_same_gradients,
    expected_loss,
    gradients_of,
    make_batch,
    make_model,
)
from tests.weights_later import later


def changed(model: nn.Module, change: Callable[[nn.Module, Any, dict[str, Any]], None]) -> nn.Module:
    """`model`, whose output is changed in place by `change(model, output, inputs)`."""
    forward = model.forward

    def changed_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        change(model, output, kwargs)
        return output

    model.forward = changed_forward
    return model


def own_loss(output: Any, labels: Tensor | None, **settings: Any) -> None:
    if labels is not None:
        output.loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **settings)


def scale_in_training(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    if model.training:
        output.logits = output.logits * 2


def smooth_in_training(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    if model.training:
        own_loss(output, inputs.get("labels"), label_smoothing=0.1)


def leave_out_padding(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    labels = inputs.get("labels")
    own_loss(output, None if labels is None else labels.masked_fill(labels == model.config.pad_token_id, -100))


def leave_out_masked(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    own_loss(output, labels if mask is None or labels is None else labels.masked_fill(mask == 0, -100))


def leave_out_end(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    labels = inputs.get("labels")
    own_loss(output, None if labels is None else labels.masked_fill(labels == model.config.eos_token_id, -100))


def flat_after_end(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
    if output.logits.shape[:2] == inputs["input_ids"].shape:
        output.logits = output.logits.masked_fill((inputs["input_ids"] == model.config.eos_token_id)[..., None], 0.0)


SPECIAL = "at padding, start or end tokens, or where attention_mask is 0"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (scale_in_training, "changes its logits .* in training mode"),
        (smooth_in_training, "own loss .* in training mode"),
        (leave_out_padding, f"own loss .* {SPECIAL}"),
        (leave_out_end, f"own loss .* {SPECIAL}"),
        (flat_after_end, "changes its logits .* position"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_student_that_does_something_else_there_is_refused(
    change: Callable[..., None], where: str, training: bool
) -> None:
    student = changed(make_model("llama", seed=1), change).train(training)
    with pytest.raises(ValueError, match=where):
        kd.attach(student, make_model("llama", seed=2), config_of())
    assert {module.training for module in student.modules()} == {training}


def test_a_teacher_that_does_something_else_at_an_end_token_is_refused() -> None:
    teacher = changed(make_model("llama", seed=2), flat_after_end)
    with pytest.raises(ValueError, match=r"the teacher .* position"):
        kd.attach(make_model("llama", seed=1), teacher, config_of())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_student_that_leaves_out_what_the_mask_hides_is_followed(mode: str) -> None:
    """As the audio models of Qwen and Granite do; the label of a hidden token is nobody's."""
    student, teacher = changed(make_model("llama", seed=1), leave_out_masked), make_model("llama", seed=2)
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = mask[1, 5:7] = 0
    hidden = batch["labels"].masked_fill(mask == 0, -100)
    assert not torch.equal(hidden, batch["labels"])
    plain = {**batch, "attention_mask": mask, "labels": hidden}
    expected = expected_loss(make_model("llama", seed=1), teacher, plain, config_of()).loss.item()
    kd.attach(getattr(student, mode)(), teacher, config_of())
    assert student(**batch, attention_mask=mask).loss.item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match=r"attention_mask hides, but that is \(2, 1, 9, 9\)"):
        student(**batch, attention_mask=mask[:, None, None].expand(-1, 1, 9, -1))


@pytest.mark.parametrize("name", ["Qwen2AudioForConditionalGeneration", "GraniteSpeechForConditionalGeneration"])
@pytest.mark.parametrize("late", [False, True])
def test_transformers_classes_that_do_so_give_their_own_loss(name: str, late: bool) -> None:
    student = small_model(name, 1)
    batch: dict[str, Any] = {"input_ids": text(3)}
    batch["labels"], batch["attention_mask"] = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -4:] = 0
    expected = student(**batch).loss.item()
    bring = later(student) if late else None
    kd.attach(student, None, kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, chunk_size=5, row_kernel="eager"))
    if bring is not None:
        bring()
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_forward_that_was_put_into_a_model_is_not_that_of_the_table() -> None:
    """With labels of -100 it fails, so nothing is learnt from it, and its class says nothing of it."""

    def other_ignore_index(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
        own_loss(output, inputs.get("labels"), ignore_index=model.config.pad_token_id)

    student = changed(make_model("llama", seed=1), other_ignore_index)
    kd.attach(student, make_model("llama", seed=2), config_of())
    with pytest.raises(ValueError, match=r"which row a label .* is not known .*out of bounds"):
        student(**make_batch())


def test_what_a_teacher_does_in_training_mode_is_of_no_concern() -> None:
    """A teacher is always in eval mode; its own loss is nobody's."""
    student, teacher, batch = make_model("llama", seed=1), make_model("llama", seed=2), make_batch()
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    kd.attach(student, changed(changed(teacher, scale_in_training), leave_out_padding).train(), config_of())
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)


def test_a_regulariser_in_training_mode_is_in_the_loss_and_in_the_gradients() -> None:
    def norm_of_embedding(model: nn.Module) -> Tensor:
        return 0.01 * model.model.embed_tokens.weight.square().sum()

    def regularised(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
        if model.training and output.loss is not None:
            output.loss = output.loss + norm_of_embedding(model)

    plain, teacher, batch = make_model("llama", seed=1), make_model("llama", seed=2), make_batch()

    def wanted() -> Tensor:
        return expected_loss(plain, teacher, batch, config_of()).loss + norm_of_embedding(plain)

    expected, gradients = wanted().item(), gradients_of(plain, wanted)
    student = changed(make_model("llama", seed=1), regularised)
    plugin = kd.attach(student, teacher, config_of())
    student.train()
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert_same_gradients(gradients_of(student, lambda: student(**batch).loss), gradients, 1e-6)
    plugin.metrics()
    student.eval()
    with torch.no_grad():
        assert student(**batch).loss.item() == pytest.approx(expected - norm_of_embedding(plain).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", *ENCODER_DECODERS])
def test_dropout_is_no_difference(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is the generator of random numbers another afterwards."""
    student = make_model(name, seed=1, dropout=0.5).train()
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "kd_plugin"):
        kd.attach(student, make_model(name, seed=2), config_of())
    assert torch.equal(torch.get_rng_state(), before)
    assert not [record for record in caplog.records if record.name.startswith("kd_plugin")]


def test_a_model_that_cannot_run_on_padding_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def picky(model: nn.Module, output: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("attention_mask") is not None:
            raise RuntimeError("no padding, please")

    with caplog.at_level(logging.WARNING, "kd_plugin"):
        kd.attach(changed(make_model("llama", seed=1), picky), make_model("llama", seed=2), config_of())
    assert "the student (LlamaForCausalLM) ran on plain tokens, but on padding in training mode" in caplog.text
    assert "no padding, please" in caplog.text


def test_running_means_of_training_mode_are_given_back() -> None:
    student = make_model("llama", seed=1).train()
    student.model.norm.register_buffer("mean", torch.zeros(3))
    runs: list[bool] = []

    def count(module: nn.Module, args: Any) -> None:
        module.mean.add_(1.0)
        runs.append(module.training)

    hook = student.model.norm.register_forward_pre_hook(count)
    kd.attach(student, make_model("llama", seed=2), config_of())
    hook.remove()
    assert not student.model.norm.mean.any() and set(runs) == {True, False}


def test_a_hook_on_the_whole_model_counts() -> None:
    """It is a part of what the model returns, as much as its forward."""
    student, teacher, batch = make_model("llama", seed=1), make_model("llama", seed=2), make_batch()

    def scaled(module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(output, "logits", None) is not None:
            output.logits = output.logits * 3
        return output

    teacher.register_forward_hook(scaled)
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    kd.attach(student, teacher, config_of())
    assert student(**batch).loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerates_wrappers_leave_a_class_its_place_in_the_table(mixed_precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = accelerate.Accelerator(mixed_precision=mixed_precision, cpu=True).prepare_model(make_model("llama", seed=1))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert ("forward" in model.__dict__) == (mixed_precision == "bf16")
    assert not is_patched(model)
    assert is_patched(changed(model, scale_in_training))
