"""One weight for a mixture's router loss, whatever the ranks, the micro-batches and the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.experts import COEFFICIENT, make_mixture
from tests.ranks import router_worker, train_worker
from tests.ranks.attach_cases import LEARNING_RATE, STEPS, Case, make_batch
from tests.ranks.launch import Launch, Launched
from tests.ranks.router_worker import MIXTURE
from tests.tiny_runs import LETTERS, make_folder, run_config

CASES = [
    Case(wrapper, "llama", teacher="replicate", num_items=counted, accumulation=2 if counted == "given" else 1)
    for wrapper in ("ddp", "fsdp", "zero2", "zero3")
    for counted in ("given", "counted")
]


class Dense(NamedTuple):
    """The truth: one process, the model's own logits and router losses."""

    parameters: dict[str, Tensor]
    router: list[float]
    losses: list[float]


@cache
def train_densely(ranks: int, accumulation: int) -> Dense:
    """Each forward's router loss weighs its share of the step's valid tokens."""
    model = make_mixture(MIXTURE)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    routers, losses = [], []
    for step in range(STEPS):
        batches = [make_batch(step, micro, rank) for micro in range(accumulation) for rank in range(ranks)]
        valid = [int((labels[:, 1:] != -100).sum()) for _, labels in batches]
        hard, router = torch.zeros(2)
        for (input_ids, labels), count in zip(batches, valid, strict=True):
            output = model(input_ids)
            logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            hard = hard + F.cross_entropy(logits, targets, reduction="sum") / sum(valid)
            router = router + COEFFICIENT * output.aux_loss * count / sum(valid)
        (hard + router).backward()
        optimizer.step()
        optimizer.zero_grad()
        routers.append(router.item())
        losses.append((hard + router).item())
    return Dense({name: p.detach() for name, p in model.named_parameters()}, routers, losses)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attached_mixtures_train_as_the_dense_weighted_mean(result_of: Callable[..., Any], case: Case) -> None:
    found, wanted = result_of(case), train_densely(case.ranks, case.accumulation)
    assert found["router"] == pytest.approx(wanted.router, rel=1e-5)
    assert found["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    start = dict(make_mixture(MIXTURE).named_parameters())
    for name, value in wanted.parameters.items():
        moved = (value - start[name]).abs().max()
        assert moved > 0, name
        assert (found["parameters"][name] - value).abs().max() < 2e-4 * moved + 1e-6, name


SEQUENCE = (LETTERS + LETTERS)[5:37]  # 32 tokens
LAYOUTS = ("ddp", "fsdp", "fsdp1", "zero3")
SPLITS = {"4 x 1": 4, "1 x 4": 1}
ONE_STEP = {"max_steps": 1, "tokens_per_step": 4 * 32, "warmup_steps": 0, "max_grad_norm": None, "export": False}


def sections(folder: Path | str, micro: int) -> dict[str, dict[str, Any]]:
    """One step over four sequences."""
    return {
        "student": {"from_teacher": None, "model": f"{folder}/mixture"},
        "distill": {"soft_weight": 0.0, "hard_weight": 1.0},
        "data": {"train": f"{folder}/same.txt", "eval_fraction": 0.1},
        "train": {**ONE_STEP, "micro_batch_size": micro},
    }


def make_mixture_folder(folder: Path) -> None:
    """A mixture with the tiny teacher's tokenizer; a text whose every sequence is the same, and one that is not."""
    from transformers import AutoTokenizer

    make_folder(folder)
    make_mixture(MIXTURE, vocab_size=64).save_pretrained(folder / "mixture")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "mixture")
    (folder / "same.txt").write_text(SEQUENCE * 60)


def run_of(layout: str, micro: int) -> dict[str, Any]:
    """One entry of the worker's list: of two ranks one sequence a micro-batch, accumulated twice; or both at once."""
    entry = sections("{folder}", micro)
    entry["train"] |= {"parallel": "deepspeed" if layout == "zero3" else layout}
    entry |= {"deepspeed": {"zero_optimization": {"stage": 3}}} if layout == "zero3" else {}
    return {"name": f"{layout} {micro}", "sections": entry}


LAUNCHES = {
    "cases": Launch(router_worker, ranks=2, spec={"train": CASES}, together="deepspeed", needs_deepspeed=True),
    "runs": Launch(
        train_worker,
        ranks=2,
        spec=[run_of(layout, micro) for layout in LAYOUTS for micro in (1, 2)],
        prepare=make_mixture_folder,
        together="deepspeed",
        needs_deepspeed=True,
    ),
}


@pytest.fixture(scope="module")
def folder(launched: Callable[[str], Launched]) -> Path:
    return launched("runs").folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, TrainResult]:
    return {name: kd.train(run_config(folder, name, **sections(folder, micro))) for name, micro in SPLITS.items()}


@cache
def dense_step(folder: Path) -> tuple[float, float, float]:
    """(loss, router loss, gradient norm) of the mixture's own loss on the one sequence, as Transformers has it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "mixture", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "mixture")
    ids = torch.tensor([tokenizer.encode(SEQUENCE)])
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return output.loss.item(), COEFFICIENT * output.aux_loss.item(), norm.item()


def test_both_splits_in_one_process_are_the_models_own_step(folder: Path, single: dict[str, TrainResult]) -> None:
    loss, router, norm = dense_step(folder)
    assert 0.2 * loss > router > 0.1 * loss  # so that twice its weight would be seen
    for result in single.values():
        found = result.history[0]
        assert (found["loss"], found["router_loss"]) == pytest.approx((loss, router), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", [f"{layout} {micro}" for layout in LAYOUTS for micro in (1, 2)])
def test_two_ranks_are_the_models_own_step_too(folder: Path, launched: Callable[[str], Launched], name: str) -> None:
    loss, router, norm = dense_step(folder)
    found = launched("runs").file("results.pt")[0][name]["history"][0]
    assert (found["loss"], found["router_loss"]) == pytest.approx((loss, router), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_dense_run_logs_no_router_loss(folder: Path) -> None:
    result = kd.train(run_config(folder, "dense", train=ONE_STEP))
    assert "router_loss" not in result.history[0]
