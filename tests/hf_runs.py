"""Tiny runs of the Hugging Face Trainer and of TRL's: rows, arguments, and the dense run to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import kd_plugin as kd
from tests import oracle
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, make_model

Row = dict[str, list[int]]

LENGTH, MICRO, ACCUMULATION, RATE = 9, 2, 4, 0.05
CONFIG = config_of(temperature=2.0)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Ragged: of each row another number of labels at the start is masked, of every fifth all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, LENGTH), generator=generator)
    labels = ids.clone()
    for index, row in enumerate(labels):
        masked = LENGTH if index % 5 == 4 else int(torch.randint(1, LENGTH - 1, (1,), generator=generator))
        row[:masked] = -100
    return [{"input_ids": i.tolist(), "labels": j.tolist()} for i, j in zip(ids, labels, strict=True)]


def with_labels(rows: Sequence[Row]) -> list[Row]:
    """TRL drops rows without any."""
    return [row for row in rows if any(label != -100 for label in row["labels"][1:])]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    names = ("input_ids", "labels")
    batch = {name: torch.tensor([row[name] for row in rows]) for name in names}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def make_pair(dtype: torch.dtype = torch.float32, name: str = "llama") -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    return make_model(name, seed=1, dtype=dtype).train(), make_model(name, seed=2, width=24, dtype=dtype)


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    """Of TrainingArguments: SGD over the rows in their order, everything logged, nothing saved."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": MICRO,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        **changed,
    }


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    return TrainingArguments(**options(folder, **changed))


def trainer_of(kind: type[Trainer], folder: Path, **changed: Any) -> Any:
    """A trainer on the usual pair and rows; `changed` go to the trainer, and those in `args` to its arguments."""
    student, teacher = make_pair()
    given = {
        "model": student,
        "teacher": teacher,
        "distill": CONFIG,
        "args": arguments(folder, **changed.pop("args", {})),
        "train_dataset": make_rows(40),
        "data_collator": collate,
    }
    return kind(**{**given, **changed})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<pad>"] + [f"w{i}" for i in range(VOCAB - 3)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def history(trainer: Trainer, name: str = "loss") -> list[float]:
    """One number of every logged step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def dense(models: tuple[nn.Module, nn.Module], rows: Sequence[Row], config: kd.DistillConfig) -> oracle.Expected:
    """The loss of both models' whole logits (fp64) over all of these rows at once."""
    batch = collate(rows)
    with torch.no_grad():
        teacher = models[1](batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    student = models[0](batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    every = torch.ones(len(student), dtype=torch.bool) if config.soft_on == "all" else None
    return oracle.distill_logits(student, teacher, batch["labels"][:, 1:].flatten(), config, soft_mask=every)


ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-2}
"""Of TrainingArguments. Without the large epsilon, the sign of a gradient that is nothing but rounding would count."""


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=ADAM["learning_rate"], eps=ADAM["adam_epsilon"], weight_decay=0.0)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


class Reference:
    """The same steps by a plain optimizer on dense fp64 losses; `losses`, `soft`, `hard` are by step."""

    def __init__(
        self,
        rows: Sequence[Row],
        config: kd.DistillConfig = CONFIG,
        *,
        steps: int = 3,
        per_step: int = MICRO * ACCUMULATION,
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    ) -> None:
        student, self.teacher = make_pair()
        self.student, self.teacher = copy.deepcopy(student).double().eval(), self.teacher.double()
        self.losses: list[float] = []
        self.soft: list[float] = []
        self.hard: list[float] = []
        stepping = optimizer(self.student.parameters())
        for step in range(steps):
            found = dense((self.student, self.teacher), rows[step * per_step : (step + 1) * per_step], config)
            stepping.zero_grad()
            found.loss.backward()
            stepping.step()
            self.losses.append(float(found.loss.detach()))
            self.soft.append(found.soft)
            self.hard.append(found.hard)


def assert_same_parameters(found: dict[str, Tensor], wanted: nn.Module, tolerance: float = 1e-5) -> None:
    """`found` by name, as `wanted` has them."""
    for name, parameter in wanted.named_parameters():
        assert oracle.relative_error(found[name].double(), parameter.detach().double()) <= tolerance, name


def approximately(values: Sequence[float]) -> Any:
    return pytest.approx(list(values), rel=1e-5)
