"""LoRA students under every wrapper train like one dense process that sees all the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import lora_worker
from tests.ranks.launch import Launch
from tests.ranks.lora_cases import Case, make_models, train_densely

TORCH = [
    Case("ddp", tied=False, exchange="weight"),
    Case("ddp", tied=True, exchange="logits", adapter="two"),
    Case("alone", tied=False, exchange="weight"),
    Case("alone", tied=False, exchange="logits", adapter="two"),
    Case("alone", tied=False, exchange="weight", adapter="only_head"),
    Case("alone", tied=False, exchange="weight", adapter="inside"),
    Case("alone", tied=False, exchange="weight", adapter="saved"),
    Case("alone", tied=False, exchange="weight", adapter="embedding"),
    Case("alone", tied=True, exchange="weight"),
    Case("root", tied=False, exchange="weight"),
    Case("ddp", tied=True, exchange="stats", adapter="two"),
    Case("alone", tied=False, exchange="stats"),
    Case("alone", tied=False, exchange="stats", adapter="two"),
    Case("alone", tied=False, exchange="stats", adapter="only_head", divergence="reverse_kl"),
    Case("alone", tied=False, exchange="stats", adapter="saved"),
    Case("root", tied=True, exchange="stats"),
    Case("fsdp1", tied=False, exchange="weight"),
    Case("fsdp1", tied=True, exchange="logits", adapter="two"),
    Case("fsdp1", tied=False, exchange="stats", adapter="two"),
]
DEEPSPEED = [
    Case("zero1", tied=False, exchange="stats"),
    Case("zero2", tied=False, exchange="weight"),
    Case("zero2", tied=True, exchange="weight", adapter="two"),
    Case("zero3", tied=False, exchange="weight"),
    Case("zero3", tied=False, exchange="logits", adapter="two"),
    Case("zero3", tied=False, exchange="stats", adapter="two"),
    Case("zero3", tied=False, exchange="weight", adapter="only_head"),
    Case("zero3", tied=False, exchange="weight", adapter="saved"),
    Case("zero3", tied=True, exchange="weight"),
]
FOUR = [
    Case("hsdp", tied=False, exchange="weight", ranks=4),
    Case("hsdp", tied=False, exchange="stats", ranks=4, adapter="two"),
    Case("hsdp", tied=True, exchange="logits", ranks=4),
]
LAUNCHES = {
    "torch": Launch(lora_worker, ranks=2, spec={"train": TORCH}, together="torch"),
    "deepspeed": Launch(lora_worker, ranks=2, spec={"train": DEEPSPEED}, needs_deepspeed=True),
    "four": Launch(lora_worker, ranks=4, spec={"train": FOUR}),
}


@functools.cache
def truth(case: Case) -> dict[str, Tensor]:
    """The dense training of `case`, once for all cases that differ only in how they are wrapped."""
    return train_densely(case)


@pytest.mark.parametrize(
    "case",
    [*TORCH, *(pytest.param(case, marks=pytest.mark.slow) for case in (*DEEPSPEED, *FOUR))],
    ids=lambda case: case.name,
)
def test_ranks_train_adapters_like_one_dense_process(result_of: Callable[..., Any], case: Case) -> None:
    """Parameters within 1e-5, after having moved a hundred times that far; frozen ones do not move."""
    found, wanted = result_of(case), truth(replace(case, wrapper="single", exchange="weight"))
    start = dict(make_models(case)[0].named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < 1e-5, name
        assert start[name].requires_grad or torch.equal(found[name], start[name]), name
    moved = [name for name, value in wanted.items() if (start[name] - value).abs().max() > 1e-3]
    assert all(any(part in name for name in moved) for part in moving_parts(case))


def moving_parts(case: Case) -> list[str]:
    """Names of layers that this training must have changed."""
    if case.adapter == "saved":
        return ["lm_head.modules_to_save.default.weight", "q_proj.lora_A"]
    if case.adapter == "embedding":
        return ["embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B", "lm_head.lora_B"]
    layer = "down_proj" if case.adapter == "inside" else "lm_head"
    return [f"{layer}.lora_A.default", f"{layer}.lora_B.default"]
