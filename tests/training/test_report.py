"""The report at the end of a run, from numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kd_plugin.training.report import diverged, report

BEFORE = {"perplexity": 200.0, "kl_t1": 8.0, "hard_loss": 5.0}
AFTER = {"perplexity": 20.0, "kl_t1": 2.0, "hard_loss": 3.0}


def shown(soft: list[float], before: dict[str, float] = BEFORE, after: dict[str, float] = AFTER) -> list[str]:
    history = [{"step": float(step), "soft_loss": value} for step, value in enumerate(soft, 1)]
    text = report(
        before, after, history=history, seconds={"load": 61.0}, memory={}, samples={}, places={"config": Path("c.yaml")}
    )
    return text.splitlines()


def test_progress_is_one_line_for_training_and_one_for_held_out_text() -> None:
    lines = shown([9.0, 7.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 2.5, 1.5])
    assert "soft loss, last fifth / first fifth of the steps: 0.250 (2.0000 / 8.0000)" in lines
    assert "KL(teacher||student) reduced by 75.0% (8.0000 -> 2.0000 nats)" in lines
    assert any(line.split() == ["held-out", "perplexity", "200.00", "20.00", "-90.0%"] for line in lines)


def test_a_student_that_has_moved_away_is_not_said_to_be_nearer() -> None:
    lines = shown([9.0], after={**AFTER, "kl_t1": 230.0})
    assert "KL(teacher||student) rose to 28.8 times (8.0000 -> 230.0000 nats)" in lines


def test_what_was_not_measured_is_left_out() -> None:
    few = shown([9.0, 7.0, 5.0, 4.0])
    assert not any("fifth" in line for line in few) and any("reduced by" in line for line in few)
    without_teacher = {"perplexity": 20.0, "hard_loss": 3.0}
    lines = shown([], without_teacher, without_teacher)
    assert not any("fifth" in line or "KL" in line for line in lines)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_student_without_predictions_has_diverged(loss: float) -> None:
    history = [{"step": 5.0, "loss": 2.0}, {"step": 10.0, "loss": loss}, {"step": 15.0, "loss": loss}]
    line = diverged(history, {"hard_loss": loss})
    assert f"cross-entropy is {loss}" in line and "step 10)" in line and "train.learning_rate" in line
    assert diverged(history, {"hard_loss": 3.0}) == ""
