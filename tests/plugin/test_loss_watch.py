"""A student that is trained past the distillation loss, whoever took the loss away: refused, or said."""

from __future__ import annotations

import copy
import logging
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.tiny_models import make_batch, make_model

CONFIG = config_of(row_kernel="eager")


def pair(dtype: torch.dtype = torch.float32, name: str = "llama") -> tuple[nn.Module, nn.Module, kd.Plugin]:
    student, teacher = make_model(name, seed=1, dtype=dtype).train(), make_model(name, seed=2, dtype=dtype)
    return student, teacher, kd.attach(student, teacher, CONFIG)


def own_forward(student: nn.Module) -> None:
    """What TRL's and Liger's patches do: a forward with a loss of its own over whatever was there."""
    plain = type(student).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    student.forward = MethodType(forward, student)


def test_a_forward_with_a_loss_of_its_own_is_refused() -> None:
    student, _, plugin = pair()
    own_forward(student)
    with pytest.raises(
        ValueError, match=r"ended without the distillation loss.*test_loss_watch.own_forward.*plugin.det"
    ):
        student(**make_batch())
    batch = make_batch()
    with pytest.raises(ValueError, match="ended without the distillation loss"):  # positional, too
        student(batch["input_ids"], None, None, None, None, batch["labels"])
    plugin.detach()
    assert torch.isfinite(student(**batch).loss)


def test_an_evaluation_past_the_loss_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    own_forward(student)
    with torch.no_grad():
        for _ in range(2):
            student(**make_batch())
    assert caplog.text.count("with labels went past the distillation loss") == 1


def test_generation_scoring_and_evaluation_without_labels_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    ids = make_batch()["input_ids"]
    student.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        student(ids)
    assert not [record for record in caplog.records if record.name.startswith("kd_plugin.plugin.loss_watch")]


def test_training_on_logits_is_said_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    ids = make_batch()["input_ids"]
    for _ in range(3):
        student(ids).logits.square().mean().backward()
    assert caplog.text.count("is trained on a forward without labels") == 1
    assert "reinforcement learning" in caplog.text and "label_smoothing_factor" in caplog.text


def test_training_in_eval_mode_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    student.eval()
    student(make_batch()["input_ids"]).logits.square().mean().backward()
    assert "is trained on a forward without labels" in caplog.text


def test_a_backbone_called_past_the_forward_is_said(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    hidden = student.model(make_batch()["input_ids"]).last_hidden_state
    F.linear(hidden, student.lm_head.weight).mean().backward()
    assert "LlamaModel is called past the student's forward" in caplog.text


def test_the_normal_ways_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    student, _, plugin = pair()
    for _ in range(2):
        student(**make_batch()).loss.backward()
    with torch.no_grad():
        student(**make_batch())
    assert plugin.metrics()["valid_tokens"] == 3 * 13
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("labelled", [True, False])
def test_no_variable_of_the_caller_is_kept_alive(labelled: bool) -> None:
    """As looking for a Trainer among the callers could; a step's tensors are large."""
    student, _, _ = pair()
    kept = torch.ones(3)
    gone = weakref.ref(kept)
    if labelled:
        with torch.no_grad():
            student(**make_batch())
    else:
        student(input_ids=make_batch()["input_ids"]).logits.sum().backward()
    del kept
    assert gone() is None


def test_metrics_without_a_token_say_that_nothing_was_distilled(caplog: pytest.LogCaptureFixture) -> None:
    student, _, plugin = pair()
    student(make_batch()["input_ids"])
    assert plugin.metrics()["valid_tokens"] == 0
    assert "nothing distilled since the last call" in caplog.text
    caplog.clear()
    student(**make_batch())
    plugin.metrics()
    plugin.metrics()  # asked twice, and nothing was called in between
    assert not caplog.text


def test_a_copy_that_is_trained_says_that_it_has_no_teacher(caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()
    copied = copy.deepcopy(student)
    for _ in range(2):
        copied(**make_batch()).loss.backward()
    assert caplog.text.count("is a copy of a student with a teacher attached") == 1


def test_the_base_of_a_peft_student_trained_alone_is_refused() -> None:
    peft = pytest.importorskip("peft")
    base = make_model("llama", dtype=torch.float32)
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    kd.attach(student, make_model("llama", seed=2, dtype=torch.float32), CONFIG)
    assert student(**make_batch()).loss.requires_grad
    with pytest.raises(ValueError, match="LlamaForCausalLM was called with labels, and its forward ended without"):
        base(**make_batch())


def test_detach_takes_the_hooks_off() -> None:
    student, _, plugin = pair()
    plugin.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
