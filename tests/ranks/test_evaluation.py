"""Without gradients a rank may be alone, wherever the wrapper's own forward lets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kd_plugin.loss import reference
from tests.ranks import evaluation_worker
from tests.ranks.attach_cases import make_models
from tests.ranks.evaluation_worker import (
    ALONE_S,
    CASES,
    OF_FOUR,
    STEPS,
    TOGETHER,
    WAITING,
    batch,
    config_of,
)
from tests.ranks.launch import Launch, Launched

LAUNCHES = {
    "two": Launch(
        evaluation_worker,
        ranks=2,
        spec={"rank 0": CASES, "ranks 0 and 1": TOGETHER},
        together="deepspeed",
        needs_deepspeed=True,
    ),
    "four": Launch(evaluation_worker, ranks=4, spec={"ranks 0 and 1": OF_FOUR}),
    **{
        name: Launch(
            evaluation_worker,
            ranks=2,
            spec={"waiting": [name]},
            needs_deepspeed=name == "zero3",
            collectives_timeout_s=ALONE_S,
        )
        for name in WAITING
    },
}


@pytest.fixture(scope="module")
def reports(launched: Callable[[str], Launched]) -> list[dict[str, dict[str, Any]]]:
    """Those of both ranks."""
    return launched("two").file("reports.pt")


def sums(step: int, ranks: tuple[int, ...]) -> tuple[float, int]:
    """(loss summed over the ranks' tokens, their number), densely, of the models as they were made.

    The steps only make gradients, so that the models stay.
    """
    student, teacher = (model.double().eval() for model in make_models("llama"))
    total, count = 0.0, 0
    for given in (batch(rank, step) for rank in ranks):
        targets = given["labels"][:, 1:].flatten()
        hidden = [
            model.model(given["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1) for model in (student, teacher)
        ]
        weights = [model.lm_head.weight for model in (student, teacher)]
        pairs = [part.detach() for pair in zip(hidden, weights, strict=True) for part in pair]
        out = reference.distill_loss(*pairs, targets, config=config_of("weight"))
        total, count = total + out.loss.item() * int(out.num_valid), count + int(out.num_valid)
    return total, count


@pytest.mark.parametrize("name", [*CASES, *TOGETHER])
def test_an_evaluation_is_the_mean_over_this_ranks_tokens(reports: list[dict[str, Any]], name: str) -> None:
    for rank, report in enumerate(reports):
        total, count = sums(100, (rank,))
        expected = [total / count] * (STEPS + 1) if rank == 0 or name in TOGETHER else []
        assert report[name]["evaluated"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*CASES, *TOGETHER])
def test_the_steps_around_it_are_those_of_all_ranks(reports: list[dict[str, Any]], name: str) -> None:
    for step in range(STEPS):
        total, count = sums(step, (0, 1))
        trained = [report[name]["trained"][step] for report in reports]
        assert sum(trained) / 2 == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", [*CASES, *TOGETHER])
def test_metrics_are_of_all_ranks(reports: list[dict[str, Any]], name: str) -> None:
    parts = [sums(step, (0, 1)) for step in range(STEPS)]
    parts += [sums(100, (0, 1) if name in TOGETHER else (0,))] * (STEPS + 1)
    valid = sum(count for _, count in parts)
    for report in reports:
        assert report[name]["metrics"]["valid_tokens"] == valid
        assert report[name]["metrics"]["loss"] == pytest.approx(sum(total for total, _ in parts) / valid, rel=1e-5)


@pytest.mark.parametrize("name", [*CASES, *TOGETHER])
def test_the_exchange_of_the_steps_is_the_one_asked_for(reports: list[dict[str, Any]], name: str) -> None:
    modes = {report[name]["mode"] for report in reports}
    asked = name.split()[1]
    assert len(modes) == 1 and (asked == "auto" or modes == {asked})


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_one_copy_of_an_hsdp_model_may_evaluate_alone(launched: Callable[[str], Launched], name: str) -> None:
    copies = launched("four").file("reports.pt")
    for rank, report in enumerate(copies):
        total, count = sums(100, (rank,))
        assert report[name]["evaluated"] == pytest.approx([total / count] * (STEPS + 1) if rank < 2 else [], rel=1e-5)
        assert report[name]["mode"] == name.split()[1]
    for step in range(STEPS):
        total, count = sums(step, (0, 1, 2, 3))
        assert sum(report[name]["trained"][step] for report in copies) / 4 == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", [WAITING[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WAITING[1:])])
def test_an_evaluation_that_needs_all_ranks_says_so_when_one_is_missing(
    launched: Callable[[str], Launched], name: str
) -> None:
    report = launched(name).file(f"{name}.pt")
    assert report["kind"] == "CollectiveError", report
    for words in ("evaluated on every rank", "FSDP", "ZeRO-3", "around its forward"):
        assert words in report["message"]
    assert report["seconds"] < ALONE_S + 10
