"""The Hugging Face Trainer with a teacher: what it optimises, logs, evaluates and saves."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from kd_plugin.hf import DistillTrainer, DistillTrainerMixin
from tests.hf_runs import (
    ACCUMULATION,
    CONFIG,
    MICRO,
    Reference,
    approximately,
    arguments,
    assert_same_parameters,
    collate,
    dense,
    history,
    make_pair,
    make_rows,
    options,
    trainer_of,
)
from tests.loss_cases import config_of

ROWS = make_rows(40)
HELD_OUT = make_rows(7, seed=9)


class Listener(TrainerCallback):
    """Hears what every tracker hears."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.heard.append(dict(logs))


PER_STEP = MICRO * ACCUMULATION


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(ROWS)


def test_losses_and_parameters_are_those_of_the_dense_loss(tmp_path: Path, reference: Reference) -> None:
    """Accumulation 4, ragged masks: one mean over the tokens of the step, however they fall into micro-batches."""
    trainer = trainer_of(DistillTrainer, tmp_path)
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert history(trainer, "soft_loss") == approximately(reference.soft)
    assert history(trainer, "hard_loss") == approximately(reference.hard)
    assert_same_parameters(trainer.model.state_dict(), reference.student)
    assert not any("teacher" in name for name in trainer.model.state_dict())


@pytest.mark.slow
def test_the_step_does_not_depend_on_how_it_is_cut(tmp_path: Path, reference: Reference) -> None:
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PER_STEP}
    trainer = trainer_of(DistillTrainer, tmp_path, args=cut)
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert_same_parameters(trainer.model.state_dict(), reference.student)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_models_whose_forward_takes_no_count_are_counted_for_too(tmp_path: Path, name: str) -> None:
    """Their labels are counted as they read them: shifted or not."""
    config = config_of(chunk_size=5)
    trainers = []
    for cut in ((1, 8), (8, 1)):
        student, teacher = make_pair(name=name)
        args = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1], "max_steps": 2}
        trainers.append(trainer_of(DistillTrainer, tmp_path, model=student, teacher=teacher, distill=config, args=args))
        trainers[-1].train()
    assert history(trainers[0]) == approximately(history(trainers[1]))
    for entry in trainers[0].state.log_history[:-1]:
        assert entry["loss"] == pytest.approx(0.7 * entry["soft_loss"] + 0.4 * entry["hard_loss"])
    assert_same_parameters(trainers[0].model.state_dict(), trainers[1].model, 1e-4)


def test_every_number_goes_through_log(tmp_path: Path) -> None:
    trainer = trainer_of(DistillTrainer, tmp_path, args={"logging_steps": 2, "max_steps": 4})
    listener = Listener()
    trainer.add_callback(listener)
    trainer.train()
    heard = listener.heard
    assert [set(logs) >= {"loss", "soft_loss", "hard_loss"} for logs in heard] == [True, True, False]
    wanted = {"top1_agreement", "kl_t1", "acceptance_rate", "teacher_entropy", "student_entropy", "valid_tokens"}
    assert wanted | {"loss_peak_gib", "logits_avoided_gib", "peak_rss_gib", "grad_norm", "learning_rate"} <= set(
        heard[0]
    )
    valid = sum(label != -100 for row in ROWS[: 2 * PER_STEP] for label in row["labels"][1:])
    assert heard[0]["valid_tokens"] == valid, "a window of two steps"
    assert all(isinstance(value, float) and math.isfinite(value) for value in heard[0].values())


def test_evaluations_are_measured_apart_from_the_steps_around_them(tmp_path: Path, reference: Reference) -> None:
    """Evaluated in the middle of a window of two steps."""
    args = {"logging_steps": 2, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(DistillTrainer, tmp_path, eval_dataset=HELD_OUT, args=args)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    valid = sum(label != -100 for row in ROWS[: 2 * PER_STEP] for label in row["labels"][1:])
    assert logged["valid_tokens"] == valid
    assert len(history(trainer, "eval_loss")) == 2
    after_one_step = Reference(ROWS, steps=1)
    wanted = dense((after_one_step.student, after_one_step.teacher), HELD_OUT, CONFIG)
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["eval_loss"] == pytest.approx(float(wanted.loss.detach()), rel=1e-5), "over tokens, not over batches"
    assert first["eval_soft_loss"] == pytest.approx(wanted.soft, rel=1e-5)
    assert first["eval_hard_loss"] == pytest.approx(wanted.hard, rel=1e-5)
    for name, value in wanted.metrics.items():
        assert first[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


def test_without_hard_loss_it_is_still_evaluated(tmp_path: Path) -> None:
    config = config_of(hard_weight=0.0, soft_weight=1.0, metrics=False)
    trainer = trainer_of(DistillTrainer, tmp_path, eval_dataset={"a": HELD_OUT, "b": ROWS[:3]}, distill=config)
    found = trainer.evaluate()
    student, teacher = make_pair(torch.float64)
    wanted = dense((student.eval(), teacher), HELD_OUT, config_of(hard_weight=0.4))
    assert found["eval_a_hard_loss"] == pytest.approx(wanted.hard, rel=1e-5)
    assert found["eval_a_loss"] == pytest.approx(found["eval_a_soft_loss"]) == pytest.approx(wanted.soft, rel=1e-5)
    assert found["eval_b_valid_tokens"] == sum(label != -100 for row in ROWS[:3] for label in row["labels"][1:])
    assert "eval_a_top1_agreement" in found
    trainer.train()
    assert "hard_loss" not in trainer.state.log_history[0], "it was not computed"


def test_logits_are_there_for_compute_metrics_and_predict(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    trainer = trainer_of(DistillTrainer, tmp_path, compute_metrics=accuracy)
    found = trainer.evaluate(HELD_OUT)
    student, _ = make_pair()
    wanted = student.eval()(collate(HELD_OUT)["input_ids"]).logits.detach()
    assert np.allclose(seen[0].predictions, wanted, atol=1e-5)
    assert (seen[0].label_ids == collate(HELD_OUT)["labels"].numpy()).all()
    assert "eval_accuracy" in found and found["eval_loss"] > 0
    output = trainer.predict(HELD_OUT)
    assert np.allclose(output.predictions, wanted, atol=1e-5)
    assert output.metrics["test_loss"] == pytest.approx(found["eval_loss"])
    trainer.data_collator = lambda rows: {"input_ids": collate(rows)["input_ids"]}
    unlabelled = trainer.predict(HELD_OUT)
    assert np.allclose(unlabelled.predictions, wanted, atol=1e-5)
    assert "test_loss" not in unlabelled.metrics


def test_an_encoder_decoder_s_logits_are_those_of_its_labels(tmp_path: Path) -> None:
    student, teacher = make_pair(name="t5")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in HELD_OUT]
    wanted = student.eval()(**collate(rows)).logits.detach()
    trainer = trainer_of(DistillTrainer, tmp_path, model=student, teacher=teacher)
    assert np.allclose(trainer.predict(rows).predictions, wanted, atol=1e-5)


@pytest.mark.slow
def test_a_trainer_that_generates_its_predictions_still_does(tmp_path: Path) -> None:
    """The mixin before Seq2SeqTrainer: predictions are what the student writes, the losses are those of the labels."""

    class Distilled(DistillTrainerMixin, Seq2SeqTrainer):
        pass

    student, teacher = make_pair(name="t5")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in HELD_OUT]
    given = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collate, "distill": CONFIG}
    args = Seq2SeqTrainingArguments(**options(tmp_path), predict_with_generate=True, generation_max_length=5)
    trainer = Distilled(model=student, teacher=teacher, args=args, **given, compute_metrics=lambda _: {"seen": 1.0})
    found = trainer.evaluate()
    assert found["eval_seen"] == 1.0 and found["eval_valid_tokens"] == 9 * len(rows)
    assert trainer.predict(rows).predictions.ndim == 2, "token ids"
    plain = trainer_of(DistillTrainer, tmp_path, model=make_pair(name="t5")[0], teacher=make_pair(name="t5")[1])
    assert found["eval_loss"] == pytest.approx(plain.evaluate(rows)["eval_loss"], rel=1e-5)


def test_a_run_resumes_as_if_it_had_not_stopped_and_ends_with_its_best(tmp_path: Path) -> None:
    """The checkpoints are the student's alone, as Trainer writes them."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    whole = trainer_of(DistillTrainer, tmp_path / "whole", eval_dataset=HELD_OUT, args=saving)
    whole.train()
    kept = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert kept.keys() == make_pair()[0].state_dict().keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-2")

    best = {**saving, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    again = trainer_of(DistillTrainer, tmp_path / "again", eval_dataset=HELD_OUT, args=best)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(again) == approximately(history(whole))
    assert history(again, "eval_loss") == approximately(history(whole, "eval_loss"))
    losses = history(whole, "eval_loss")
    chosen = Path(again.state.best_model_checkpoint)
    assert losses[2] < losses[3] and chosen.name == "checkpoint-3", "not the last"
    assert again.state.best_metric == pytest.approx(losses[2])
    for name, value in load_file(chosen / "model.safetensors").items():
        assert torch.equal(again.model.state_dict()[name], value), name
    again.save_model(str(tmp_path / "exported"))
    again.plugin.detach()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = collate(HELD_OUT)["input_ids"]
    assert torch.allclose(plain(ids).logits, again.model.eval()(ids).logits, atol=1e-6)


class Hub:
    """Stands for the hub: remembers what is put there."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
        paths = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.files[repo_id] = {path.name: path.read_bytes() for path in paths}


def test_what_is_pushed_to_the_hub_is_the_student_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = trainer_of(DistillTrainer, tmp_path / "run", args={"hub_model_id": "me/student"})
    trainer.train()
    trainer.push_to_hub()
    pushed = load(hub.files["me/student"]["model.safetensors"])
    assert pushed.keys() == make_pair()[0].state_dict().keys()
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in pushed.items())
    assert {"config.json", "README.md"} <= hub.files["me/student"].keys()


def test_a_teacher_may_be_a_folder(tmp_path: Path, reference: Reference) -> None:
    _, teacher = make_pair()
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = trainer_of(DistillTrainer, tmp_path / "run", teacher=str(tmp_path / "teacher"))
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert not any(p.requires_grad for p in trainer.plugin.teacher.parameters())


@pytest.mark.slow
def test_the_student_of_model_init_is_distilled_in_every_run(tmp_path: Path, reference: Reference) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(make_pair()[0])
        return made[-1]

    trainer = trainer_of(DistillTrainer, tmp_path, model=None, model_init=make)
    for _ in range(2):
        trainer.state.log_history.clear()
        trainer.train()
        assert history(trainer) == approximately(reference.losses)
    assert len(made) == 3 and "forward" not in made[0].__dict__, "the first student is as it was"


@pytest.mark.slow
def test_without_a_soft_loss_no_teacher_is_needed(tmp_path: Path) -> None:
    trainer = trainer_of(
        DistillTrainer, tmp_path, teacher=None, distill=config_of(soft_weight=0.0, hard_weight=1.0), eval_dataset=ROWS
    )
    plain = Trainer(model=make_pair()[0], args=arguments(tmp_path), train_dataset=make_rows(40), data_collator=collate)
    trainer.train()
    plain.train()
    assert history(trainer) == approximately(history(plain))
    assert "soft_loss" not in trainer.state.log_history[0] and "eval_soft_loss" not in trainer.evaluate()
