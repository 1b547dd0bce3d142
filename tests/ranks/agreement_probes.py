"""Losses, gradients and metrics, by what crosses the wire. Every probe takes this process's rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.loss.chunk_size import ChunkSize
from tests.ranks.attach_cases import make_model
from tests.ranks.sharded_heads import (
    MODES,
    VOCAB_SIZE,
    make_config,
    shard_head,
)
from tests.ranks.worker import save_probes

SMALLER_TEACHERS = (17, 31)  # of the student's 37 ids; with 17, rank 1 of two has none of them
LARGER: dict[str, dict[str, Any]] = {
    "all parts": {"divergence": "jsd", "label_smoothing": 0.1, "z_loss_weight": 0.02},
    "temperature 1": {"divergence": "reverse_kl", "temperature": 1.0},
    "soft only": {"divergence": "tvd", "hard_weight": 0.0},
    "soft only, no metrics": {"hard_weight": 0.0, "metrics": False},
    "hard only": {"soft_weight": 0.0},
}


def agreement(rank: int) -> dict[str, list[Tensor]]:
    """In fp64, by mode: this rank's loss, and the whole gradient of the student's head."""
    found = {}
    for mode in MODES:
        models = [make_model("llama", width, VOCAB_SIZE, seed=i).double() for i, width in enumerate((16, 24))]
        kd.attach(*models, make_config(mode))
        for model in models:
            shard_head(model)
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        loss = models[0](input_ids, shift_labels=input_ids, num_items_in_batch=50).loss
        loss.backward()
        found[mode] = [loss.detach(), models[0].get_output_embeddings().weight.grad.full_tensor()]
    return found


def chunk_sizes(rank: int) -> dict[str, tuple[list[float], list[float], int]]:
    """In fp64, by mode: losses with rows per chunk that each rank chooses by its device, those of 9 rows, and the rows.

    The first loss is an evaluation's, before the ranks have agreed.
    """
    found = {}
    for mode in MODES:
        losses, rows = [], []
        for config in (make_config(mode, chunk_size="auto"), make_config(mode, chunk_size=9)):
            models = [make_model("llama", width, VOCAB_SIZE, seed=i).double() for i, width in enumerate((16, 24))]
            plugin = kd.attach(*models, config)
            settle = plugin.agreed_chunk._settle
            plugin.agreed_chunk._settle = lambda own, differs, settle=settle: settle(own, differs=True)
            for model in models:
                shard_head(model)
            ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(rank))
            with patch_chunk(13 - 4 * rank):
                with torch.no_grad():
                    values = [models[0](ids, shift_labels=ids).loss.item()]
                loss = models[0](ids, shift_labels=ids, num_items_in_batch=50).loss
                loss.backward()
            losses.append([*values, loss.item()])
            rows.append(plugin.chunk_size)
        found[mode] = *losses, rows[0]
    return found


def patch_chunk(rows: int) -> AbstractContextManager[object]:
    """Let `chunk_size: auto` come to `rows`, as on a GPU with so much free memory."""

    def chosen(config: kd.DistillConfig, *_: object) -> ChunkSize:
        return ChunkSize(rows if config.chunk_size == "auto" else config.chunk_size, "free memory")

    patches = ExitStack()
    for module in ("exchange.agreed_chunk", "loss.from_hidden"):
        patches.enter_context(mock.patch(f"kd_plugin.{module}.chunk_size_on", chosen))
    return patches


def larger_student(rank: int) -> dict[tuple[str, int, str], tuple[float, Tensor, dict[str, float]]]:
    """In fp64, by objective, the teacher's size and mode: this rank's loss, the head's gradient, what is measured."""
    found = {}
    for name, settings in LARGER.items():
        for size in SMALLER_TEACHERS:
            for mode in MODES:
                models = [make_model("llama", width, n, seed=n).double() for width, n in ((16, 37), (24, size))]
                plugin = kd.attach(*models, make_config(mode, **settings))
                for model in models:
                    shard_head(model)
                generator = torch.Generator().manual_seed(rank)
                ids, labels = torch.randint(37, (2, 2, 11 + rank), generator=generator)
                loss = models[0](ids % size, shift_labels=labels, num_items_in_batch=50).loss
                loss.backward()
                gradient = models[0].get_output_embeddings().weight.grad.full_tensor()
                measured = {k: v for k, v in plugin.metrics().items() if not k.endswith("_ms") and "peak" not in k}
                found[name, size, mode] = loss.item(), gradient, measured
    return found


def following_teacher(rank: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """In fp64, by mode and by what is written to between steps of whole models: (loss, that in mode `weight`)."""

    def write_head(teacher: Any) -> None:  # as a moving average of the student's weights does
        with torch.no_grad():
            teacher.get_output_embeddings().weight.mul_(1.5)

    def load(teacher: Any) -> None:
        teacher.load_state_dict({name: 1.5 * value for name, value in teacher.state_dict().items()})

    def cap(teacher: Any) -> None:
        teacher.config.final_logit_softcapping = 2.0

    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(rank))
    found: dict[tuple[str, str], list[float]] = {}
    for change in (write_head, load, cap):
        for mode in MODES:
            models = [make_model("gemma2", width, VOCAB_SIZE, seed=i).double() for i, width in enumerate((16, 24))]
            kd.attach(*models, make_config(mode))
            losses = found[change.__name__, mode] = []
            for _ in range(3):
                losses.append(models[0](input_ids, shift_labels=input_ids, num_items_in_batch=44).loss.item())
                change(models[1])
    return {
        (change, mode): list(zip(losses, found[change, "weight"], strict=True))
        for (change, mode), losses in found.items()
    }


def tensor_parallel(rank: int) -> dict[str, float]:
    """Largest error of loss and gradients with a teacher's logits in slices, fp64, by how they are cut."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same rows on every rank
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (11, 37))
    targets = torch.randint(30, (11,), generator=generator)
    targets[[2, 7]] = -100
    found = {}
    for size in (30, 41):  # fewer token ids than the student's, and more
        logits = torch.randn(11, size, generator=generator, dtype=torch.float64)
        even = [size // ranks + (r < size % ranks) for r in range(ranks)]
        for name, widths in {"even": even, "one": [size - ranks + 1] + [1] * (ranks - 1), "empty": [size]}.items():
            widths = widths + [0] * (ranks - len(widths))
            head = nn.Linear(16, 37, bias=False, dtype=torch.float64)
            head.weight.data.copy_(weight)
            head = kd.DistillHead(head, make_config("weight", chunk_size=4))
            own = logits.split(widths, dim=1)[rank]
            x, y = (hidden.clone().requires_grad_(True) for _ in range(2))
            given = {} if name == "even" else {"widths": widths}
            ours = head(x, targets, teacher=kd.ShardedLogits(own, **given)).loss
            dense_weight = weight.clone().requires_grad_(True)
            config = make_config("weight")
            dense = kd.reference.distill_logits(y @ dense_weight.T, logits, targets, config=config).loss
            pairs = [(ours, dense)]
            pairs += zip(
                torch.autograd.grad(ours, (x, head.weight)), torch.autograd.grad(dense, (y, dense_weight)), strict=True
            )
            found[f"{name}, {size}"] = max(float((one - other).abs().max()) for one, other in pairs)
    return found


def loss_of_compiled(rank: int, wrap: Callable[[Any], Any], *, before: bool = False) -> float:
    """This rank's loss; `wrap` puts things around an attached student, `before` compiles both models before that."""
    torch._dynamo.reset()
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(rank))
    student, teacher = (make_model("llama", width, VOCAB_SIZE, seed=i) for i, width in enumerate((16, 24)))
    if before:
        student, teacher = (torch.compile(model, backend="eager") for model in (student, teacher))
    kd.attach(student, teacher, make_config("weight"))
    model = wrap(student)  # kept: a DDP wrapper that is gone before backward reduces nothing
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    return loss.item()


def compiled(rank: int) -> dict[str, tuple[float, float]]:
    """By what is compiled, and around what: this rank's loss, and that of the same student left as it is."""
    plain = loss_of_compiled(rank, DistributedDataParallel)
    found = {
        "around DDP": loss_of_compiled(rank, lambda s: torch.compile(DistributedDataParallel(s), backend="eager")),
        "both models before attach": loss_of_compiled(rank, DistributedDataParallel, before=True),
    }
    return {name: (loss, plain) for name, loss in found.items()}


def compiled_elsewhere(rank: int) -> dict[str, tuple[float, float]]:
    """As `compiled`, in the other places for it."""

    def compile_in_place(student: Any) -> Any:
        student.compile(backend="eager")
        return DistributedDataParallel(student)

    plain = loss_of_compiled(rank, DistributedDataParallel)
    found = {
        "alone": loss_of_compiled(rank, lambda s: torch.compile(s, backend="eager")),
        "in place": loss_of_compiled(rank, compile_in_place),
        "in DDP": loss_of_compiled(rank, lambda s: DistributedDataParallel(torch.compile(s, backend="eager"))),
    }
    return {name: (loss, plain) for name, loss in found.items()}


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Write FOLDER/<name>.pt for the functions that `spec` names."""
    save_probes(folder, [globals()[name] for name in spec], rank)
