"""Speeds of a device in round numbers, so that an estimate neither measures this machine nor depends on it."""

from __future__ import annotations

from kd_plugin.estimate.speeds import LayerSpeeds, Speeds

LAYERS = LayerSpeeds(product=1e9, attention=5e8, elementwise=1e10)
SPEEDS = Speeds(
    student=LAYERS,
    teacher=LAYERS._replace(product=2e9),
    student_logits=3e9,
    teacher_logits=4e9,
    hidden_gradient=5e9,
    head_gradient=6e9,
    memory=7e9,
    fresh=3e9,
    logit_seconds=8e-9,
    wire=9e8,
    operation_seconds=1e-6,
    is_asynchronous=False,
    how="given",
)
