"""`soft_on: all` in the Hugging Face Trainer: both losses are means over the whole step, each over its own tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_plugin.hf import DistillOnPolicyMixin, DistillTrainer, batches
from tests.hf_runs import (
    Reference,
    approximately,
    assert_same_parameters,
    collate,
    dense,
    history,
    make_rows,
    trainer_of,
)
from tests.loss_cases import config_of
from tests.refusals import refused

CONFIG = config_of(temperature=2.0, soft_on="all")
ROWS, HELD_OUT = make_rows(40), make_rows(7, seed=9)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(ROWS, CONFIG)


@pytest.mark.parametrize(
    "changed",
    [{}, {"teacher_micro_batches": 2}, {"args": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}}],
)
def test_losses_and_parameters_are_those_of_the_dense_loss(
    tmp_path: Path, reference: Reference, changed: dict[str, Any]
) -> None:
    trainer = trainer_of(DistillTrainer, tmp_path, distill=CONFIG, **changed)
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert history(trainer, "soft_loss") == approximately(reference.soft)
    assert history(trainer, "hard_loss") == approximately(reference.hard)
    assert_same_parameters(trainer.model.state_dict(), reference.student)
    first = next(entry for entry in trainer.state.log_history if "soft_loss" in entry)
    assert first["valid_tokens"] == 8 * 8 > first["trained_tokens"]


def test_an_evaluation_is_over_all_tokens(tmp_path: Path) -> None:
    trainer = trainer_of(DistillTrainer, tmp_path, distill=CONFIG, eval_dataset=HELD_OUT)
    found = trainer.evaluate()
    student, teacher = trainer.model, trainer.plugin.teacher
    trainer.plugin.detach()
    wanted = dense((student.eval(), teacher), HELD_OUT, CONFIG)
    assert found["eval_loss"] == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
    assert found["eval_soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
    assert found["eval_valid_tokens"] == 7 * 8


def test_rows_that_fill_up_the_last_batch_count_in_neither_loss(tmp_path: Path) -> None:
    """As accelerate has it on the second of two ranks, with a row of the beginning after one that is new."""
    trainer = trainer_of(DistillTrainer, tmp_path, distill=CONFIG)
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=1, gradient_state=state)
    batch = batches.without_repeats(collate(ROWS[:2]), accelerator, trainer.plugin)
    assert batch["loss_rows"].tolist() == list(range(8))
    assert (batch["labels"][1] == -100).all() and not (batch["labels"][0] == -100).all()
    with torch.no_grad():
        trainer.model(**batch)
    assert trainer.plugin.metrics()["valid_tokens"] == 8


def test_trainers_whose_student_writes_are_refused() -> None:
    refused(lambda: DistillOnPolicyMixin(teacher=None, distill=CONFIG), "distill.soft_on is all", "set it to trained")
