"""What the exchange parity tests train: the cases, their ragged batches, and the dense truth in one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests.ranks import attach_cases

STEPS = 3
SEQUENCES = 16  # of a `split` batch, over all ranks
RAGGED = (0, 64, 320, 1)  # valid rows of each rank in a `ragged` batch


@dataclass(frozen=True)
class Case:
    """One training: how it is wrapped, what its heads exchange, what it learns from."""

    wrapper: str
    """ddp, fsdp1, hsdp, zero1, zero2, zero3, or FSDP2 by the unit of the head: alone, grouped (with the norm), root"""
    tied: bool
    exchange: str
    divergence: str = "forward_kl"
    ranks: int = 2
    dtype: str = "float32"
    vocab_size: int = 37
    teacher_vocab_size: int = 37
    batch: str = "steps"
    """steps (3 steps, lengths by rank), split (one step on the same 16 sequences), ragged (one step, `RAGGED`), early
    (3 steps, of which only the first rank has labels after the first, and nobody in the last)"""
    accumulation: int = 1
    chunk_size: int = 5
    loss: str = "attached"
    """attached, or dense: the same wrapper with whole logits and autograd, no plugin"""
    teacher: str = "shard"
    """shard, offload (sharded, parameters kept in host memory), or part (in one wrapper with the student)"""
    teacher_tied: bool | None = None
    """None: as the student."""
    head: str = "plain"
    """plain, bias (the head has one, as Phi's), or softcap (Gemma 2, always tied)"""
    seed: int = 0
    """Of the batches."""
    autocast: bool = False
    """fp32 models whose forwards run under bf16 autocast"""
    soft_on: str = "trained"
    counted: bool = False
    """the plugin counts the tokens of all ranks itself, where there is one micro-batch"""
    own_input: bool = False
    """the teacher reads two tokens more, in front of each sequence"""

    num_items = "given"

    @property
    def name(self) -> str:
        parts = [self.wrapper, "tied" if self.tied else "untied", self.exchange, self.divergence]
        parts += [f"{self.ranks}ranks", self.dtype, f"v{self.vocab_size}.{self.teacher_vocab_size}", self.batch]
        parts += [f"x{self.accumulation}", f"c{self.chunk_size}", self.loss, self.teacher, f"s{self.seed}"]
        parts += ["autocast"] if self.autocast else []
        parts += [f"on_{self.soft_on}"] if self.soft_on != "trained" else []
        parts += ["own_input"] if self.own_input else []
        parts += ["counted"] if self.counted else []
        parts += [self.head] if self.head != "plain" else []
        parts += [] if self.teacher_tied is None else [f"teacher_{'tied' if self.teacher_tied else 'untied'}"]
        return "-".join(parts)

    @property
    def tied_teacher(self) -> bool:
        return self.tied if self.teacher_tied is None else self.teacher_tied

    @property
    def steps(self) -> int:
        return STEPS if self.batch in ("steps", "early") else 1

    @property
    def learning_rate(self) -> float:
        return 0.1 if self.steps > 1 else 1.0  # 1: what a step takes away is the gradient itself

    @property
    def config(self) -> kd.DistillConfig:
        return kd.DistillConfig(
            divergence=self.divergence,
            temperature=2.0,
            soft_weight=0.7,
            hard_weight=0.3,
            chunk_size=self.chunk_size,
            row_kernel="eager",
            exchange=self.exchange,
            soft_on=self.soft_on,
        )


def make_models(case: Case) -> tuple[nn.Module, nn.Module]:
    """(student, teacher) of different widths."""
    architectures = {"bias": "phi", "softcap": "gemma2"}
    student = architectures.get(case.head, "qwen3_tied" if case.tied else "llama")
    teacher = architectures.get(case.head, "qwen3_tied" if case.tied_teacher else "llama")
    return (
        attach_cases.make_model(student, attach_cases.STUDENT_WIDTH, case.vocab_size, seed=1),
        attach_cases.make_model(teacher, attach_cases.TEACHER_WIDTH, case.teacher_vocab_size, seed=2),
    )


def make_batch(case: Case, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) `[B, S]`."""
    if case.batch == "steps":
        input_ids, labels = attach_cases.make_batch(step + 21 * case.seed, micro, rank)
    elif case.batch == "early":
        input_ids, labels = attach_cases.make_batch(0, micro, rank)
        if step == STEPS - 1 or (step and rank):
            input_ids, labels = input_ids[:1, :2], torch.full((1, 2), -100)
    elif case.batch == "split":
        input_ids, labels = _sequences()
        number = case.ranks * case.accumulation
        size, first = SEQUENCES // number, rank * case.accumulation + micro
        input_ids, labels = (t[first * size : (first + 1) * size] for t in (input_ids, labels))
    else:
        input_ids = torch.randint(3, 37, (6, 64), generator=torch.Generator().manual_seed(rank))
        counts = torch.arange(6 * 63).view(6, 63) < RAGGED[rank]
        labels = input_ids.masked_fill(~torch.cat([torch.zeros(6, 1, dtype=torch.bool), counts], 1), -100)
    smallest = min(case.vocab_size, case.teacher_vocab_size)  # what both embed; a label may be any id of the student
    return input_ids % smallest, torch.where(labels < 0, labels, labels % case.vocab_size)


def _sequences() -> tuple[Tensor, Tensor]:
    """The 16 sequences; of the last one no token counts."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(3, 37, (SEQUENCES, 12), generator=generator)
    masked = torch.rand(SEQUENCES, 12, generator=generator) < torch.linspace(0, 1, SEQUENCES)[:, None]
    return input_ids, input_ids.masked_fill(masked, -100)


def count_valid(case: Case, step: int) -> int:
    """Valid tokens of one optimizer step over all ranks and micro-batches."""
    pairs = [(micro, rank) for micro in range(case.accumulation) for rank in range(case.ranks)]
    return sum(int((make_batch(case, step, *pair)[1][:, 1:] != -100).sum()) for pair in pairs)


def real_tokens(input_ids: Tensor) -> Tensor:
    """An attention mask `[B, S]` that hides the last token of the first sequence, where there are more than two."""
    mask = torch.ones_like(input_ids)
    mask[0, 3:][-1:] = 0
    return mask


def soft_rows(input_ids: Tensor, labels: Tensor) -> Tensor:
    """The rows `[B, S - 1]` of the soft loss on all tokens, found one by one."""
    mask, found = real_tokens(input_ids), torch.zeros_like(labels[:, 1:], dtype=torch.bool)
    for b, s in torch.cartesian_prod(torch.arange(found.shape[0]), torch.arange(found.shape[1])).tolist():
        found[b, s] = bool(mask[b, s] and mask[b, s + 1]) or labels[b, s + 1] != -100
    return found


def count_soft(case: Case, step: int) -> int:
    """Rows of the soft loss of one optimizer step over all ranks and micro-batches."""
    pairs = [(micro, rank) for micro in range(case.accumulation) for rank in range(case.ranks)]
    return sum(int(soft_rows(*make_batch(case, step, *pair)).sum()) for pair in pairs)


def dense_on_all(case: Case, models: tuple[nn.Module, nn.Module], batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    """As `dense_loss`, each loss on its own rows and divided by their number in the step."""
    input_ids, labels = batch
    mask = real_tokens(input_ids)
    with torch.no_grad():
        teachers = models[1](input_ids, attention_mask=mask).logits[:, :-1]
    students, rows = models[0](input_ids, attention_mask=mask).logits[:, :-1], soft_rows(input_ids, labels)
    soft = case.config.model_copy(update={"soft_on": "trained", "hard_weight": 0.0})
    hard = case.config.model_copy(update={"soft_weight": 0.0})
    counts = max(count_soft(case, step), 1), max(count_valid(case, step), 1)
    of_soft = kd.reference.distill_logits(students[rows], teachers[rows], config=soft, num_items=counts[0]).loss
    of_hard = kd.reference.distill_logits(students, None, labels[:, 1:], config=hard, num_items=counts[1]).loss
    return of_soft + of_hard


def teacher_inputs(input_ids: Tensor) -> dict[str, Tensor]:
    """What the teacher reads in place of `input_ids`, and its row for each of the student's."""
    ids = torch.cat([input_ids.flip(0, 1)[:, :2], input_ids], 1)
    rows = torch.arange(ids.numel()).view(ids.shape)[:, 2:]
    return {"teacher_input_ids": ids, "teacher_rows": rows}


def dense_loss(case: Case, student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor], items: int) -> Tensor:
    """Both models' own whole logits and plain autograd; the sum over this batch's rows, divided by `items`."""
    input_ids, labels = batch
    with torch.no_grad():
        if case.own_input:
            teacher_logits = teacher(teacher_inputs(input_ids)["teacher_input_ids"]).logits[:, 2:-1]
        else:
            teacher_logits = teacher(input_ids).logits[:, :-1]
    logits = student(input_ids).logits[:, :-1]
    return kd.reference.distill_logits(logits, teacher_logits, labels[:, 1:], config=case.config, num_items=items).loss


def train_densely(case: Case, models: tuple[nn.Module, nn.Module] | None = None) -> dict[str, Tensor]:
    """The truth for `case`: parameters of `models` (default: `make_models`) after training in one process, fp64."""
    student, teacher = (model.double() for model in models or make_models(case))
    optimizer = torch.optim.SGD(student.parameters(), lr=case.learning_rate)
    for step in range(case.steps):
        items = count_valid(case, step)
        for micro in range(case.accumulation):
            for rank in range(case.ranks):
                batch = make_batch(case, step, micro, rank)
                if case.soft_on == "all":
                    dense_on_all(case, (student, teacher), batch, step).backward()
                else:
                    dense_loss(case, student, teacher, batch, items).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in student.named_parameters()}
