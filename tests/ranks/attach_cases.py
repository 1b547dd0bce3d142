"""What the attach parity tests train: tiny models, ragged batches, and the dense truth in one process.

The truth shares nothing with the plugin but `kd_plugin.reference`: each model computes its own full logits in
fp64, all ranks' batches are seen by one process, and PyTorch differentiates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests import tiny_models

STEPS = 3
LEARNING_RATE = 0.1
VOCAB_SIZE = 37  # odd: divisible by no number of ranks
STUDENT_WIDTH, TEACHER_WIDTH = 16, 24
TEACHER_VOCAB_SIZE = {"llama": 41}  # a padded vocabulary, cut to the shared rows
# Each architecture also brings its own divergence.
DIVERGENCES = {"llama": "forward_kl", "qwen3_tied": "reverse_kl", "gpt2": "jsd", "gemma2": "soft_ce"}
DIVERGENCES |= {"opt": "forward_kl", "phi": "tvd"}
ARCHITECTURES = tuple(DIVERGENCES)

METRICS = ("loss", "soft_loss", "hard_loss", "valid_tokens", "teacher_entropy", "student_entropy", "top1_agreement")
METRICS += ("acceptance_rate", "kl_t1")


@dataclass(frozen=True)
class Case:
    """One training, by how it is wrapped and how its tokens are counted."""

    wrapper: str
    """single, ddp, replicate (FSDP2 in DDP's layout), fsdp, zero2 or zero3"""
    architecture: str
    ranks: int = 2
    teacher: str = "shard"
    """shard or replicate"""
    num_items: str = "counted"
    """counted by the plugin's own collective, or given as num_items_in_batch"""
    accumulation: int = 1
    row_kernel: str = "eager"
    chunk_size: int = 5
    loading: str = "whole"
    """whole, zero.Init (both models partitioned before attach, as from_pretrained does under ZeRO-3) or
    teacher-first (the teacher sharded before attach)"""
    exchange: str = "weight"

    @property
    def name(self) -> str:
        parts = [self.wrapper, self.architecture, f"{self.ranks}ranks", self.teacher, self.num_items]
        parts += [f"x{self.accumulation}", self.row_kernel, f"c{self.chunk_size}"]
        return "-".join([*parts, *([] if self.loading == "whole" else [self.loading, self.exchange])])

    @property
    def config(self) -> kd.DistillConfig:
        return kd.DistillConfig(
            divergence=DIVERGENCES[self.architecture],
            temperature=2.0,
            soft_weight=0.7,
            hard_weight=0.3,
            chunk_size=self.chunk_size,
            row_kernel=self.row_kernel,
            exchange=self.exchange,
        )


class Trained(NamedTuple):
    """What a training leaves behind."""

    parameters: dict[str, Tensor]
    losses: list[float]  # of each step, over all ranks and micro-batches
    metrics: dict[str, float]


def make_model(architecture: str, width: int, vocab_size: int, seed: int) -> nn.Module:
    """A model in training mode, fp32."""
    sizes = {"width": width, "vocab_size": vocab_size, "dtype": torch.float32}
    return tiny_models.make_model(architecture, **sizes, seed=seed, attn_implementation="eager").train()


def make_models(architecture: str) -> tuple[nn.Module, nn.Module]:
    """(student, teacher) of different widths."""
    student = make_model(architecture, STUDENT_WIDTH, VOCAB_SIZE, seed=1)
    vocab_size = TEACHER_VOCAB_SIZE.get(architecture, VOCAB_SIZE)
    return student, make_model(architecture, TEACHER_WIDTH, vocab_size, seed=2)


def make_batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) `[B, S]`: S and the number of masked labels differ by rank, step and micro-batch.

    In the second step the second of any two ranks has no valid token at all.
    """
    generator = torch.Generator().manual_seed(2000 * step + 100 * micro + rank)
    batch_size, seq_len = 1 + (rank + step) % 2, 6 + (5 * rank + 3 * step + 2 * micro) % 9
    input_ids = torch.randint(3, VOCAB_SIZE, (batch_size, seq_len), generator=generator)
    masked = torch.rand(batch_size, seq_len, generator=generator) < 0.2
    masked[:, : 2 + rank % 2] = True
    if step == 1 and rank % 2 == 1:
        masked[:] = True
    return input_ids, input_ids.masked_fill(masked, -100)


def count_valid(labels: Tensor) -> int:
    """Labels that some position predicts."""
    return int((labels[:, 1:] != -100).sum())


def items_of_step(case: Case, step: int) -> int:
    """Valid tokens of all ranks and micro-batches of one optimizer step."""
    pairs = [(micro, rank) for micro in range(case.accumulation) for rank in range(case.ranks)]
    return sum(count_valid(make_batch(step, *pair)[1]) for pair in pairs)


def train_densely(case: Case) -> Trained:
    """The truth for `case`: one process, full logits, fp64."""
    student, teacher = (model.double() for model in make_models(case.architecture))
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    losses, sums = [], dict.fromkeys(METRICS, 0.0)
    for step in range(STEPS):
        loss_of_step = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulation):
            batches = [make_batch(step, micro, rank) for rank in range(case.ranks)]
            if case.num_items == "given":
                items = items_of_step(case, step)
            else:  # what a micro-batch alone can know: its own tokens, each micro-batch with equal weight
                items = case.accumulation * sum(count_valid(labels) for _, labels in batches)
            for input_ids, labels in batches:
                with torch.no_grad():
                    teacher_logits = teacher(input_ids).logits[:, :-1]
                student_logits = student(input_ids).logits[:, :-1]
                out = kd.reference.distill_logits(
                    student_logits, teacher_logits, labels[:, 1:], config=case.config, num_items=items
                )
                out.loss.backward()
                loss_of_step += out.loss.detach()
                _add_metrics(sums, out, items)
        losses.append(float(loss_of_step))
        optimizer.step()
        optimizer.zero_grad()
    valid = sums.pop("valid_tokens")
    metrics = {name: total / valid for name, total in sums.items()} | {"valid_tokens": valid}
    return Trained({name: value.detach() for name, value in student.named_parameters()}, losses, metrics)


def _add_metrics(sums: dict[str, float], out: Any, items: int) -> None:
    """Add one micro-batch's sums over its valid rows."""
    rows = int(out.num_valid)
    for name in ("loss", "soft_loss", "hard_loss"):
        sums[name] += float(getattr(out, name).detach()) * items
    for name, mean in out.metrics.items():
        sums[name] += float(mean) * rows
    sums["valid_tokens"] += rows
