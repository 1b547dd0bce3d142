"""One rank of exchange.py: `exchange_worker.py JOB.json LINES.json`, under torchrun.

A pair of bare heads: Hugging Face models without layers, so that a step is the heads, their loss and what they
exchange. Only the heads are FSDP2 units.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_rank
from received import Received
from torch import nn
from torch.distributed.fsdp import fully_shard

import kd_plugin as kd
from kd_plugin.engines import fsdp_units

PRODUCTS = "products"
"""Instead of an exchange: the four matrix products of a rank's rows, by `torch.mm`, which none of them can avoid."""
VARIANTS = {"no metrics": {"metrics": False}, "eager": {"row_kernel": "eager"}}
IDS = 64  # of the embeddings, which stay whole; labels come from the whole vocabulary


@dataclass(frozen=True)
class Job:
    """What one launch measures."""

    vocab: int
    width: int
    rows: tuple[int, ...]
    """Rows of each rank."""
    modes: tuple[str, ...]
    rounds: int
    seconds: float
    """No further round is begun after about this long for one number of rows, from the fourth on."""
    threads: int


def make_model(job: Job, seed: int) -> nn.Module:
    """A model of embedding, norm and a head `[V, D]`, without layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": IDS, "hidden_size": job.width, "intermediate_size": 8, "num_hidden_layers": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=max(job.rows)))
    head = nn.utils.skip_init(nn.Linear, job.width, job.vocab, bias=False)
    nn.init.normal_(head.weight, std=2 / job.width**0.5)
    model.set_output_embeddings(head)
    return model


def shard(model: nn.Module) -> None:
    """Shard the head alone; the rest stays whole, and the embedding is frozen."""
    head, mesh = model.get_output_embeddings(), fsdp_units.make_mesh("cpu", dist.get_world_size())
    model.get_input_embeddings().requires_grad_(False)
    fully_shard(head, mesh=mesh)
    if head.weight.requires_grad:
        head.set_unshard_in_backward(False)
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - set(head.parameters()))


def make_step(job: Job, mode: str) -> Callable[[int], float]:
    """Make a step on so many rows that returns its loss; `mode` is `PRODUCTS`, an exchange, or `EXCHANGE, VARIANT`."""
    if mode == PRODUCTS:
        return _products(job)
    exchange, _, variant = mode.partition(", ")
    student, teacher = make_model(job, 0), make_model(job, 1)
    kd.attach(student, teacher, kd.DistillConfig(exchange=exchange, **VARIANTS.get(variant, {})))
    shard(student)
    shard(teacher)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, IDS, (1, max(job.rows)), generator=generator)
    labels = torch.randint(job.vocab, ids.shape, generator=generator)

    def step(rows: int) -> float:
        items = rows * dist.get_world_size()
        loss = student(ids[:, :rows], shift_labels=labels[:, :rows], num_items_in_batch=items).loss
        loss.backward()
        student.zero_grad()
        return float(loss.detach())

    return step


def _products(job: Job) -> Callable[[int], float]:
    hidden, weight = torch.randn(max(job.rows), job.width), torch.randn(job.vocab, job.width)
    logits = torch.empty(max(job.rows), job.vocab)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step(rows: int) -> float:
        for _ in range(2):  # student and teacher
            torch.mm(hidden[:rows], weight.t(), out=logits[:rows])
        torch.mm(logits[:rows], weight, out=grad_hidden[:rows])
        torch.mm(logits[:rows].t(), hidden[:rows], out=grad_weight)
        return 0.0

    return step


def measure(job: Job) -> list[dict[str, Any]]:
    """Measure every number of rows and mode, the modes in turn; one line each: seconds by round, bytes, loss."""
    steps = {mode: make_step(job, mode) for mode in job.modes}
    for step in steps.values():  # compiles, cuts the teacher's head
        step(min(job.rows))
    table = []
    for rows in job.rows:
        lines = {mode: {"rows": rows, "mode": mode, "seconds": []} for mode in steps}
        for mode, step in steps.items():
            with Received() as log, torch.compiler.set_stance("force_eager"):  # nothing compiles inside such a mode
                lines[mode]["loss"] = step(rows)
            lines[mode]["bytes"] = log.total
        begin = time.perf_counter()
        for number in range(1, job.rounds + 1):
            for mode, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step(rows)
                dist.barrier()
                lines[mode]["seconds"].append(time.perf_counter() - start)
            spent: list[Any] = [time.perf_counter() - begin]
            dist.broadcast_object_list(spent)  # the ranks stop together
            if number >= min(3, job.rounds) and spent[0] > job.seconds:
                break
        table += lines.values()
    return table


if __name__ == "__main__":
    run_rank(Job, measure)
