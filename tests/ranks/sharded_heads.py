"""Tiny pairs of which only the heads are sharded, so that everything seen of a step is the heads'."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import kd_plugin as kd
from kd_plugin.engines import fsdp_units
from tests.ranks.attach_cases import make_model

VOCAB_SIZE, STUDENT_WIDTH, TEACHER_WIDTH, CHUNK = 1021, 16, 24, 8
# In the rounds of `make_config`: two for each of four softmaxes, the label's logit, agreement; no sums.
NUMBERS = (10, 0)
MODES = ("weight", "logits", "stats")


def shard_head(model: nn.Module) -> None:
    """Only the head is an FSDP unit; everything else stays whole, and the embedding is frozen."""
    head = model.get_output_embeddings()
    model.get_input_embeddings().requires_grad_(False)
    mesh = fsdp_units.make_mesh("cpu", dist.get_world_size())
    fully_shard(head, mesh=mesh)
    if head.weight.requires_grad:
        head.set_unshard_in_backward(False)
    others = set(model.parameters()) - set(head.parameters())
    fully_shard(model, mesh=mesh, ignored_params=others, reshard_after_forward=True)


def make_student(
    config: kd.DistillConfig, vocab_size: int, widths: tuple[int, int], head_size: int | None = None
) -> Any:
    """-> (student, plugin), heads sharded; `head_size` rows in both heads instead of the vocabulary's."""
    models = [make_model("llama", width, vocab_size, seed=i) for i, width in enumerate(widths)]
    if head_size is not None:
        for model in models:
            head = nn.utils.skip_init(nn.Linear, model.config.hidden_size, head_size, bias=False)
            nn.init.constant_(head.weight, 0.01)
            model.set_output_embeddings(head)
    student, teacher = models
    plugin = kd.attach(student, teacher, config)
    shard_head(student)
    shard_head(teacher)
    return student, plugin


def make_config(exchange: str, **changes: Any) -> kd.DistillConfig:
    """Temperature 2, so that there are two softmaxes for each model."""
    settings = {"temperature": 2.0, "chunk_size": CHUNK, "row_kernel": "eager", "exchange": exchange, **changes}
    return kd.DistillConfig(**settings)


def step(student: nn.Module, input_ids: Tensor) -> None:
    """One forward and backward in which every row counts."""
    items = input_ids.numel() * dist.get_world_size()
    student(input_ids, shift_labels=input_ids, num_items_in_batch=items).loss.backward()
    student.zero_grad()
