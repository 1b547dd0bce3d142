"""What changes a model's logits and is set after `attach`, or given in a call, counts from then on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.tiny_models import (
    expected_loss,
    make_batch,
    make_model,
    with_changed_logits,
)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_of_the_logits_that_is_loaded_after_attach_counts(side: str) -> None:
    """Build, attach, load a checkpoint: the order that many scripts have."""
    models = {"student": make_model("bart", seed=1), "teacher": make_model("bart", seed=2)}
    loaded = make_model("bart", seed=3 if side == "student" else 4).state_dict()
    kd.attach(models["student"], models["teacher"], config_of())
    models["student"](**make_batch())
    models[side].load_state_dict(loaded)
    plain = {"student": make_model("bart", seed=1), "teacher": make_model("bart", seed=2)}
    plain[side].load_state_dict(loaded)
    expected = expected_loss(plain["student"], plain["teacher"], make_batch(), config_of()).loss.item()
    for _ in range(2):
        assert models["student"](**make_batch()).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["attribute", "configuration", "whole number", "parameter"])
def test_a_scale_of_the_logits_that_is_set_after_attach_counts(side: str, kind: str) -> None:
    """As a soft-cap switched off in the configuration, or a frozen temperature that a calibration writes."""

    def make(name: str, scale: float) -> nn.Module:
        model = make_model("llama", seed=1 if name == "student" else 2)
        owner = model.config if kind in ("configuration", "whole number") else model
        tensor = torch.tensor(scale, dtype=torch.float64)
        owner.factor = nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else scale
        return with_changed_logits(model, lambda logits: logits * owner.factor)

    batch, names = make_batch(), ("student", "teacher")
    before, after = (2, 3) if kind == "whole number" else (0.5, 3.0)
    models = {name: make(name, before) for name in names}
    expected = expected_loss(*(make(n, after if n == side else before) for n in names), batch, config_of()).loss.item()
    for model in models.values():  # its own loss is of the logits before
        model.loss_function = lambda **kwargs: None
    kd.attach(*models.values(), config_of())
    models["student"](**batch)
    if kind == "parameter":
        models[side].factor.copy_(torch.tensor(3.0))
    else:
        (models[side] if kind == "attribute" else models[side].config).factor = 3.0
    for _ in range(2):
        assert models["student"](**batch).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [3.0, 2])
def test_a_number_in_the_call_that_changes_the_logits_counts(factor: float) -> None:
    """A temperature as an argument of the forward, of a model that has one."""

    def tempered(seed: int) -> nn.Module:
        model = make_model("llama", seed=seed)
        forward = model.forward

        def with_temperature(*args: Any, temperature: float = 1.0, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits / temperature
            return output

        model.forward, model.loss_function = with_temperature, lambda **kwargs: None
        return model

    student, teacher, batch = tempered(1), tempered(2), make_batch()
    wanted = {
        value: expected_loss(student, teacher, {**batch, "temperature": value}, config_of()).loss.item()
        for value in (1.0, factor)
    }
    assert abs(wanted[1.0] - wanted[factor]) > 1e-3
    kd.attach(student, teacher, config_of())
    for value in (1.0, factor, factor, 1.0):
        assert student(**batch, temperature=value).loss.item() == pytest.approx(wanted[value], rel=1e-5)
    assert student(**batch).loss.item() == pytest.approx(wanted[1.0], rel=1e-5)
