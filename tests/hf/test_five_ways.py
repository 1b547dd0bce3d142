"""kd.train, Trainer, SFTTrainer, loops of accelerate's, of Lightning's and of one's own take the same five steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import kd_plugin as kd
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.hf import DistillTrainer, DistillTrainerMixin
from tests import oracle
from tests.chat_data import write_jsonl
from tests.hf_runs import arguments, assert_same_parameters, make_tokenizer, options
from tests.tiny_runs import WORDS, curve, make_folder, run_config

STEPS, ACCUMULATION, RATE, EPSILON = 5, 4, 5e-3, 1e-2
DISTILL = {"temperature": 2.0, "soft_weight": 0.6, "hard_weight": 0.4, "row_kernel": "eager", "chunk_size": 48}


TALK = [
    {"prompt": " ".join(WORDS[i % 7 : i % 7 + 2]), "completion": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 6])}
    for i in range(90)
]


class Steps(NamedTuple):
    """What one of the ways has done, or is to do."""

    losses: list[float]
    parameters: dict[str, Tensor]


class Given(NamedTuple):
    """What `kd.train` has worked on: five steps of four micro-batches, and the models at the start."""

    student: nn.Module
    teacher: nn.Module
    batches: list[dict[str, Tensor]]
    """`input_ids` and `labels` `[2, 32]`, the labels unshifted."""


Trained = tuple[Given, Steps]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """By `kd.train`, on prompts and answers, of which the prompts are masked; its batches are recorded."""
    folder = make_folder(tmp_path_factory.mktemp("five"))
    config = run_config(
        folder,
        distill=DISTILL,
        # The others' batches have no positions that would keep documents apart
        data={"seq_len": 32, "train": write_jsonl(folder / "talk.jsonl", *TALK), "packing": "joined"},
        train={
            **{"max_steps": STEPS, "tokens_per_step": None, "gradient_accumulation_steps": ACCUMULATION},
            **{"learning_rate": RATE, "warmup_steps": 0, "schedule": "constant", "max_grad_norm": None},
            **{"adam_eps": EPSILON, "adam_betas": (0.9, 0.999), "save_every": 0},
        },
    )
    seen: list[dict[str, Tensor]] = []
    first: list[nn.Module] = []
    final: dict[str, Tensor] = {}
    plain = FsdpEngine.forward_backward

    def recorded(self: FsdpEngine, inputs: dict[str, Tensor], **rest: Any) -> Tensor:
        if not first:
            for model in (self.module, self.teacher):
                first.append(type(model)(copy.deepcopy(model.config)))  # type: ignore[call-arg]
                first[-1].load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
        seen.append({name: value.clone() for name, value in inputs.items()})
        loss = plain(self, inputs, **rest)
        final.update({name: p for name, p in self.module.named_parameters()})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "forward_backward", recorded)
        result = kd.train(config)
    batches = [{"input_ids": one["input_ids"], "labels": unshifted(one)} for one in seen]
    losses = curve(result)
    yield (
        Given(first[0], first[1], batches),
        Steps(losses, {name: whole(p).detach().clone() for name, p in final.items()}),
    )


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def unshifted(inputs: dict[str, Tensor]) -> Tensor:
    """Labels as a causal language model takes them, ragged: of each micro-batch other rows do not count."""
    labels = torch.full_like(inputs["shift_labels"], -100)
    labels[:, 1:] = inputs["shift_labels"][:, :-1]
    return labels


def rows_of(given: Given) -> list[dict[str, list[int]]]:
    """The sequences in their order."""
    return [
        {"input_ids": batch["input_ids"][i].tolist(), "labels": batch["labels"][i].tolist()}
        for batch in given.batches
        for i in range(len(batch["labels"]))
    ]


def steps_of(given: Given) -> list[list[dict[str, Tensor]]]:
    return [given.batches[start : start + ACCUMULATION] for start in range(0, STEPS * ACCUMULATION, ACCUMULATION)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, betas=(0.9, 0.999), weight_decay=0.0)


def with_pair(given: Given) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(given.student).train(), copy.deepcopy(given.teacher)


def by_dense_loss(given: Given, folder: Path) -> Steps:
    student, teacher = (model.double() for model in with_pair(given))
    optimizer, losses = adam(student), []
    for batches in steps_of(given):
        ids, labels = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            wanted = teacher(ids).logits[:, :-1].flatten(0, 1)
        logits = student(ids).logits[:, :-1].flatten(0, 1)
        loss = oracle.distill_logits(logits, wanted, labels[:, 1:].flatten(), kd.DistillConfig(**DISTILL)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Steps(losses, dict(student.named_parameters()))


def by_plain_loop(given: Given, folder: Path) -> Steps:
    student, teacher = with_pair(given)
    kd.attach(student, teacher, kd.DistillConfig(**DISTILL))
    optimizer, losses = adam(student), []
    for batches in steps_of(given):
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        parts = [student(**batch, num_items_in_batch=items).loss for batch in batches]
        for loss in parts:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in parts))
    return Steps(losses, dict(student.named_parameters()))


def by_accelerate_loop(given: Given, folder: Path) -> Steps:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    student, teacher = with_pair(given)
    plugin = kd.attach(student, teacher, kd.DistillConfig(**DISTILL))
    model, optimizer = accelerator.prepare(student, adam(student))
    losses = []
    for batches in steps_of(given):
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items).loss
                # accelerate divides by the accumulation steps, which the number of tokens has done already
                accelerator.backward(loss * ACCUMULATION)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(plugin.metrics()["loss"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return Steps(losses, dict(student.named_parameters()))


def by_lightning(given: Given, folder: Path) -> Steps:
    """Its automatic optimisation, which divides by the accumulated batches, as accelerate does."""
    lightning: Any = pytest.importorskip("lightning")
    student, teacher = with_pair(given)
    plugin = kd.attach(student, teacher, kd.DistillConfig(**DISTILL))
    losses: list[float] = []

    class Distilled(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
            return self.student(**batch).loss * ACCUMULATION

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            if (index + 1) % ACCUMULATION == 0:
                losses.append(plugin.metrics()["loss"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.student)

    counted: list[dict[str, Any]] = []
    for batches in steps_of(given):
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        counted += [{**batch, "num_items_in_batch": items} for batch in batches]
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=ACCUMULATION, default_root_dir=folder, **silent
    )
    trainer.fit(Distilled(), torch.utils.data.DataLoader(counted, batch_size=None))  # type: ignore[arg-type]
    return Steps(losses, dict(student.named_parameters()))


ADAM = {
    **{"optim": "adamw_torch", "learning_rate": RATE, "adam_epsilon": EPSILON, "weight_decay": 0.0},
    **{"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "per_device_train_batch_size": 2},
}


def by_trainer(given: Given, folder: Path) -> Steps:
    student, teacher = with_pair(given)
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        distill=kd.DistillConfig(**DISTILL),
        args=arguments(folder, **ADAM),
        train_dataset=rows_of(given),
    )
    return steps_by(trainer)


def by_sft_trainer(given: Given, folder: Path) -> Steps:
    import datasets

    trl = pytest.importorskip("trl")

    class DistillSFTTrainer(DistillTrainerMixin, trl.SFTTrainer):
        pass

    student, teacher = with_pair(given)
    trainer = DistillSFTTrainer(
        model=student,
        teacher=teacher,
        distill=kd.DistillConfig(**DISTILL),
        args=trl.SFTConfig(**options(folder, **ADAM)),
        train_dataset=datasets.Dataset.from_list(rows_of(given)),
        processing_class=make_tokenizer(),
    )
    return steps_by(trainer)


def steps_by(trainer: Any) -> Steps:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Steps(losses, dict(trainer.model.named_parameters()))


WAYS: dict[str, Callable[[Given, Path], Steps]] = {
    "dense loss": by_dense_loss,
    "plain loop": by_plain_loop,
    "accelerate": by_accelerate_loop,
    "Lightning": by_lightning,
    "Trainer": by_trainer,
    "SFTTrainer": by_sft_trainer,
}


# TRL 1.16 sets it by the name that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
# Lightning 2.6 asks torch's trees by a name that torch 2.13 deprecates, and advises on workers and intervals of logging
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '?train_dataloader'? does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_the_losses_and_parameters_of_kd_train(trained: Trained, tmp_path: Path, way: str) -> None:
    given, wanted = trained
    found = WAYS[way](given, tmp_path)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5) and len(found.losses) == STEPS
    last = copy.deepcopy(given.student)
    last.load_state_dict(wanted.parameters, strict=False)
    assert_same_parameters({name: p.detach() for name, p in found.parameters.items()}, last)


def test_the_batches_are_ragged(trained: Trained) -> None:
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in trained[0].batches]
    assert len(counts) == STEPS * ACCUMULATION and len(set(counts)) > 3
