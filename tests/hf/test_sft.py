"""TRL's SFTTrainer with a teacher, through the mixin: its fused head replaces the student's forward when it is made."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from kd_plugin.hf import DistillTrainerMixin
from tests.chat_data import CONVERSATION, MARKED_CHAT, WORDS
from tests.chat_data import make_tokenizer as make_chat_tokenizer
from tests.hf_runs import (
    CONFIG,
    Reference,
    approximately,
    assert_same_parameters,
    dense,
    history,
    make_pair,
    make_rows,
    make_tokenizer,
    options,
    with_labels,
)
from tests.tiny_models import make_model

trl = pytest.importorskip("trl")
# TRL 1.16 sets it by the name that transformers 5.23 deprecates
OLD_NAME = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
pytestmark = [OLD_NAME, pytest.mark.slow]

# A row ends with its last word's token, not with the space after it, by which transformers would miss the end.
CHAT = MARKED_CHAT.replace("' <eos> ' }}{% endgeneration %}", "' <eos>' }}{% endgeneration %}{{ ' ' }}")


ROWS = with_labels(make_rows(50))
HELD_OUT = with_labels(make_rows(9, seed=9))


class DistillSFTTrainer(DistillTrainerMixin, trl.SFTTrainer):
    """As the README has it."""


def sft(folder: Path, rows: list[dict[str, Any]] | None = None, **changed: Any) -> Any:
    """`changed` go to the trainer, and those in `args` to its arguments."""
    student, teacher = make_pair()
    args = trl.SFTConfig(**{**options(folder), **changed.pop("args", {})})
    given = {
        "model": student,
        "teacher": teacher,
        "distill": CONFIG,
        "args": args,
        "train_dataset": datasets.Dataset.from_list(ROWS if rows is None else rows),
        "processing_class": make_tokenizer(),
    }
    return DistillSFTTrainer(**{**given, **changed})


def test_losses_and_parameters_are_those_of_the_dense_loss(tmp_path: Path) -> None:
    reference = Reference(ROWS)
    trainer = sft(tmp_path, eval_dataset=datasets.Dataset.from_list(HELD_OUT))
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert history(trainer, "soft_loss") == approximately(reference.soft)
    assert_same_parameters(trainer.model.state_dict(), reference.student)
    found = trainer.evaluate()
    wanted = dense((reference.student, reference.teacher), HELD_OUT, CONFIG)
    assert found["eval_loss"] == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
    assert found["eval_hard_loss"] == pytest.approx(wanted.hard, rel=1e-5)


def test_logits_are_there_for_compute_metrics(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def look(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL will not hand logits out in its version 2
        trainer = sft(tmp_path, eval_dataset=datasets.Dataset.from_list(HELD_OUT), compute_metrics=look)
        trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in HELD_OUT])
    assert np.allclose(seen[0], make_pair()[0].eval()(ids).logits.detach(), atol=1e-5)


def ragged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of different lengths."""
    cut = [{name: value[: 4 + index % 6] for name, value in row.items()} for index, row in enumerate(rows)]
    return with_labels(cut)


def test_padding_free_batches_give_the_loss_of_padded_ones(tmp_path: Path) -> None:
    rows = ragged(ROWS)
    padded, free = sft(tmp_path, rows), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TRL's advice on attention that needs a GPU
        free = sft(tmp_path, rows, args={"padding_free": True, "max_length": None})
    for trainer in (padded, free):
        trainer.train()
    assert history(free) == approximately(history(padded))
    assert_same_parameters(free.model.state_dict(), padded.model)
    counted = [sum(label != -100 for row in rows[k : k + 8] for label in row["labels"][1:]) for k in (0, 8, 16)]
    assert history(free, "valid_tokens") == counted


def test_assistant_only_loss_trains_on_the_assistant_s_words(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(CHAT)
    tokenizer.pad_token = "<eos>"
    talk = [[*CONVERSATION[:2], {"role": "user", "content": word}, *CONVERSATION[3:]] for word in WORDS[7:15]]
    student, teacher = (make_model("llama", seed=seed, vocab_size=len(WORDS), dtype=torch.float32) for seed in (1, 2))
    trainer = sft(
        tmp_path,
        [{"messages": messages} for messages in talk],
        args={"assistant_only_loss": True, "max_steps": 1, "eos_token": "<eos>"},
        processing_class=tokenizer,
        model=student,
        teacher=teacher,
    )
    trainer.train()
    assert trainer.state.log_history[0]["valid_tokens"] == 8 * (2 + 3), "yes <eos>, because a <eos>"


@pytest.mark.parametrize("strategy", ["group_by_length"])
def test_rows_grouped_by_length_are_distilled_like_others(tmp_path: Path, strategy: str) -> None:
    trainer = sft(tmp_path, ragged(ROWS), args={"train_sampling_strategy": strategy, "max_steps": 2})
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(0.7 * entry["soft_loss"] + 0.4 * entry["hard_loss"], rel=1e-5)
    assert trainer.state.log_history[0]["valid_tokens"] > 0


def test_a_lora_student_is_distilled(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = sft(tmp_path, peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]), args={"save_steps": 1})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all("lora_" in name for name in changed)
    assert history(trainer)[:1] == approximately(Reference(ROWS, steps=1).losses)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
