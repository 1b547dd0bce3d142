"""TRL's on-policy trainers with this loss: TRL's own is the reference, on the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.hf import DistillOnPolicyMixin
from tests.chat_data import CHAT, CONVERSATION, WORDS, make_tokenizer
from tests.hf_runs import history, options
from tests.oracle import relative_error
from tests.refusals import refused
from tests.tiny_models import make_model

trl = pytest.importorskip("trl")
gkd = pytest.importorskip("trl.experimental.gkd")
pytestmark = [
    pytest.mark.slow,
    # TRL 1.16 sets and calls it by the names that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]

TALK = [{"messages": [*CONVERSATION[:1], {"role": "assistant", "content": f"{w} a b"}]} for w in WORDS[7:]]
PROMPTS = [{"prompt": [{"role": "user", "content": word}]} for word in WORDS[7:]]


class DistillGKDTrainer(DistillOnPolicyMixin, gkd.GKDTrainer):
    """As the README has it."""


class DistillDistillationTrainer(DistillOnPolicyMixin, trl.DistillationTrainer):
    """Likewise."""


def objective(beta: float) -> kd.DistillConfig:
    """TRL's, in our words."""
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    mixture = {"beta": beta} if name == "jsd" else {}
    weights = {"temperature_power": 0, "soft_weight": 1.0, "hard_weight": 0.0}
    return kd.DistillConfig(divergence=name, **mixture, **weights, row_kernel="eager", chunk_size=7)


def models() -> tuple[nn.Module, nn.Module]:
    make = {"vocab_size": len(WORDS), "dtype": torch.float32}
    return make_model("llama", seed=1, **make), make_model("llama", seed=2, width=24, **make)


def tokenizer() -> Any:
    made = make_tokenizer(CHAT)
    made.pad_token = "<unk>"
    made.eos_token = "<eos>"
    made.padding_side = "left"
    return made


def given(student: nn.Module, args: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    data = datasets.Dataset.from_list(rows)
    return {"model": student, "args": args, "train_dataset": data, "processing_class": tokenizer()}


def gkd_args(folder: Path, **changed: Any) -> Any:
    values = {**options(folder), "max_length": 32, "max_new_tokens": 4, "temperature": 1.3, "lmbda": 0.0, **changed}
    return gkd.GKDConfig(**values)


def distillation_args(folder: Path, **changed: Any) -> Any:
    values = {**options(folder), "max_completion_length": 4, **changed}
    values.pop("train_sampling_strategy")
    return trl.DistillationConfig(**values)


def pair_of(kind: str, folder: Path, beta: float, **changed: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, on equal models."""
    theirs, ours = models(), models()
    args = {"beta": beta, **changed}
    if kind == "gkd":
        their = gkd.GKDTrainer(**given(theirs[0], gkd_args(folder, **args), TALK), teacher_model=theirs[1])
        own = given(ours[0], gkd_args(folder, **args), TALK)
        return their, DistillGKDTrainer(**own, teacher=ours[1], distill=objective(beta))
    rows = PROMPTS
    their = trl.DistillationTrainer(
        **given(theirs[0], distillation_args(folder, **args), rows), teacher_model=theirs[1]
    )
    own = given(ours[0], distillation_args(folder, **args), rows)
    return their, DistillDistillationTrainer(**own, teacher=ours[1], distill=objective(beta))


def batch_of(kind: str) -> dict[str, Tensor]:
    """Padded on the left and on the right, with a turn of a tool in the middle of the completions."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, len(WORDS), (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :3] = mask[0, 9:] = 0
    if kind == "gkd":
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :5] = -100
        return {
            **{"input_ids": ids, "attention_mask": mask, "labels": labels},
            **{"prompts": ids[:, :5], "prompt_attention_mask": mask[:, :5]},
        }
    tools = torch.ones_like(ids[:, 5:])
    tools[1, 2:4] = 0
    return {
        **{"prompt_ids": ids[:, :5], "prompt_mask": mask[:, :5], "tool_mask": tools},
        **{"completion_ids": ids[:, 5:], "completion_mask": mask[:, 5:]},
    }


def gradient(trainer: Any, batch: dict[str, Tensor], num_items: Tensor | None) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("counted", [False, True], ids=["mean", "num_items_in_batch"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_trl_s_own_loss_and_gradient_on_the_same_batch(tmp_path: Path, kind: str, beta: float, counted: bool) -> None:
    theirs, ours = pair_of(kind, tmp_path, beta)
    batch, num_items = batch_of(kind), torch.tensor(29.0) if counted else None
    if counted and kind == "distillation":  # its own count of what was generated goes before
        batch["num_items_in_batch"] = torch.tensor(31.0)
    for trainer in (theirs, ours):
        trainer.model.train()
    wanted, found = (gradient(trainer, batch, num_items) for trainer in (theirs, ours))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, value in wanted[1].items():
        assert relative_error(found[1][name], value) <= 1e-5, name


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_what_the_student_writes_is_distilled_by_any_divergence(tmp_path: Path, kind: str) -> None:
    """Generated, trained, evaluated and logged by TRL's own loop; no logits of whole batches are made."""
    student, teacher = models()
    config = kd.DistillConfig(divergence="tvd", temperature=2.0, soft_weight=1.0, hard_weight=0.5, row_kernel="eager")
    ours = {"teacher": teacher, "distill": config}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    if kind == "gkd":
        trainer: Any = DistillGKDTrainer(**given(student, gkd_args(tmp_path, lmbda=1.0), TALK), **ours)
        held_out = trainer.train_dataset
    else:
        trainer = DistillDistillationTrainer(**given(student, distillation_args(tmp_path), PROMPTS), **ours)
        held_out = datasets.Dataset.from_list(PROMPTS[:3])
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(entry["soft_loss"] + 0.5 * entry["hard_loss"], rel=1e-5)
        assert entry["entropy"] == entry["student_entropy"] > 0
        assert 0 < entry["valid_tokens"] <= 8 * 4
    assert len(history(trainer)) == 3
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    found = trainer.evaluate(held_out)
    assert found["eval_loss"] == pytest.approx(found["eval_soft_loss"] + 0.5 * found["eval_hard_loss"], rel=1e-5)


def test_gkd_divides_what_it_generates_by_its_own_tokens(tmp_path: Path) -> None:
    """The Trainer has counted the tokens of the data set, which the student has not been trained on."""
    student, teacher = models()
    trainer = DistillGKDTrainer(
        **given(student, gkd_args(tmp_path, lmbda=1.0), TALK), teacher=teacher, distill=objective(0.5)
    )
    batch = {name: value.clone() for name, value in batch_of("gkd").items()}
    trainer.current_gradient_accumulation_steps = 4
    losses = [trainer.training_step(trainer.model, dict(batch), torch.tensor(count)) for count in (10.0,)]
    measured = trainer.plugin.metrics()
    assert float(losses[0]) == pytest.approx(measured["loss"] / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"teacher_model": 1}, ["teacher_model is TRL's name"]),
        ({"teacher_micro_batches": 2}, ["teacher_micro_batches", "leave it at 1"]),
    ],
    ids=str,
)
def test_wrong_keywords_are_named(tmp_path: Path, wrong: dict[str, Any], words: list[str]) -> None:
    student, teacher = models()
    arguments = given(student, gkd_args(tmp_path), TALK)
    refused(lambda: DistillGKDTrainer(**arguments, teacher=teacher, distill=objective(0.5), **wrong), *words)


def test_a_beta_of_trl_s_that_says_otherwise_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = models()
    DistillGKDTrainer(**given(student, gkd_args(tmp_path, beta=0.9), TALK), teacher=teacher, distill=objective(0.3))
    assert "beta=0.9 of GKDConfig has no effect" in caplog.text
