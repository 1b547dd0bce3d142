"""attach under every wrapper trains like one dense process that sees all the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.ranks import attach_worker
from tests.ranks.attach_cases import (
    ARCHITECTURES,
    STEPS,
    STUDENT_WIDTH,
    VOCAB_SIZE,
    Case,
    Trained,
    count_valid,
    make_batch,
    make_models,
    train_densely,
)
from tests.ranks.launch import Launch


def cases_of(wrapper: str) -> list[Case]:
    """Every architecture, and for two of them (untied, tied) every other way to train."""
    # Who replicates the student usually replicates the teacher.
    usual, other = ("replicate", "shard") if wrapper == "ddp" else ("shard", "replicate")
    return [
        *(Case(wrapper, architecture, teacher=usual) for architecture in ARCHITECTURES),
        *(Case(wrapper, name, teacher=other, num_items="given") for name in ("llama", "gpt2")),
        *(Case(wrapper, name, teacher=usual, num_items="given", accumulation=2) for name in ("llama", "qwen3_tied")),
        Case(wrapper, "llama", teacher=usual, accumulation=2),
        Case(wrapper, "gemma2", teacher=usual, row_kernel="compile"),
    ]


SINGLE = [
    *(Case("single", name, ranks=1) for name in ARCHITECTURES),
    *(Case("single", name, ranks=1, num_items="given", accumulation=2) for name in ARCHITECTURES),
]
REPLICATE = [Case("replicate", "llama"), Case("replicate", "qwen3_tied", teacher="replicate", num_items="given")]
FOUR = [
    case
    for wrapper in ("fsdp", "zero3")
    for case in (
        Case(wrapper, "llama", ranks=4),
        Case(wrapper, "gpt2", ranks=4, num_items="given", accumulation=2),
    )
]
# The collectives of a step, with many chunks and with one.
PAIRS = {
    name: [Case(wrapper, "llama", chunk_size=size) for size in (1, 64)]
    for name, wrapper in (("torch", "fsdp"), ("deepspeed", "zero3"))
}
TIED = Case("fsdp", "gpt2")
WATCHED = {**PAIRS, "torch": [*PAIRS["torch"], TIED]}
# What cannot be measured at attach is measured in the first forward: a soft-cap, tied and untied heads, a bias
LATER = {
    "torch": [
        *(Case("fsdp", "gemma2", loading="teacher-first", exchange=mode) for mode in ("weight", "logits", "stats")),
        Case("fsdp", "phi", loading="teacher-first", exchange="stats"),
    ],
    "deepspeed": [Case("zero3", name, loading="zero.Init") for name in ("gemma2", "gpt2", "phi")],
}
# Of the wrappers that leave the student's weights whole a few are quick.
FEW = [
    case
    for wrapper in ("ddp", "zero2")
    for case in cases_of(wrapper)
    if case.architecture == "gpt2" or (case.architecture == "llama" and case.accumulation > 1)
]
TRAINED = {
    "torch": [*(case for case in FEW if case.wrapper == "ddp"), *cases_of("fsdp"), *REPLICATE, *LATER["torch"]],
    "deepspeed": [*(case for case in FEW if case.wrapper == "zero2"), *cases_of("zero3"), *LATER["deepspeed"]],
    "four": FOUR,
    "torch, all": [case for case in cases_of("ddp") if case not in FEW],
    "deepspeed, all": [case for case in cases_of("zero2") if case not in FEW],
}
QUICK = ("torch", "deepspeed")
LAUNCHES = {
    name: Launch(
        attach_worker,
        ranks=4 if name == "four" else 2,
        spec={"train": cases, "watch": WATCHED.get(name, [])},
        together=name if name in QUICK else "",
        needs_deepspeed=name != "torch" and name != "torch, all",
    )
    for name, cases in TRAINED.items()
}
PARAMS = [
    case if name in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for name, cases in TRAINED.items()
    for case in cases
]
SHARDED = [
    case if name in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for name, cases in TRAINED.items()
    for case in cases
    if case.teacher == "shard"
]


@functools.cache
def truth(case: Case) -> Trained:
    """The dense training of `case`, once for all cases that differ only in how they are wrapped."""
    return train_densely(case)


def dense(case: Case) -> Trained:
    plain = {"loading": "whole", "exchange": "weight"}
    return truth(replace(case, wrapper="single", teacher="shard", row_kernel="eager", chunk_size=5, **plain))


@pytest.fixture
def calls_of(result_of: Callable[..., Any]) -> Callable[[Case], Any]:
    """The collectives of a step; two of the cases are not trained."""
    return lambda case: result_of(case, "watch")


def assert_trained_alike(found: dict[str, Any], case: Case) -> None:
    """Parameters within 1e-5, after having moved a hundred times that far; losses and metrics likewise."""
    expected = dense(case)
    assert found["parameters"].keys() == expected.parameters.keys()
    start = dict(make_models(case.architecture)[0].named_parameters())
    for name, value in expected.parameters.items():
        assert (found["parameters"][name] - value).abs().max() < 1e-5, name
    assert max((start[name] - value).abs().max() for name, value in expected.parameters.items()) > 1e-3
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-5)
    assert found["metrics"] == pytest.approx(expected.metrics, rel=1e-5)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_one_process_trains_like_the_dense_models(case: Case) -> None:
    assert_trained_alike(attach_worker.train(case, rank=0), case)


@pytest.mark.parametrize("case", PARAMS, ids=lambda case: case.name)
def test_ranks_train_like_one_dense_process(result_of: Callable[..., Any], case: Case) -> None:
    found = result_of(case)
    assert_trained_alike(found, case)
    assert found["metrics_of_ranks"] == [found["metrics"]] * case.ranks


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_a_sharded_teacher_is_given_back_after_each_use(result_of: Callable[..., Any], case: Case) -> None:
    assert result_of(case)["whole_in_teacher"] == []


def test_a_replicated_teacher_stays_whole(result_of: Callable[..., Any]) -> None:
    case = Case("ddp", "gpt2", teacher="replicate")
    names = [name for name, _ in make_models("gpt2")[1].named_parameters()]
    assert result_of(case)["whole_in_teacher"] == names


def test_the_second_rank_has_a_step_without_tokens() -> None:
    counts = [[count_valid(make_batch(step, 0, rank)[1]) for rank in range(2)] for step in range(STEPS)]
    assert counts[1][1] == 0 and counts[1][0] > 0
    assert all(len(set(pair)) == 2 for pair in counts)
    assert max(counts[0]) > Case("fsdp", "llama").chunk_size, "one chunk only would test little"


@pytest.mark.parametrize("case", PAIRS["torch"], ids=lambda case: case.name)
def test_fsdp_gathers_each_head_once_and_reduces_its_gradient_once(calls_of: Callable[..., Any], case: Case) -> None:
    calls = calls_of(case)
    for head in ("student head", "teacher head"):
        gathers = [call for call in calls if call.parameter == head]
        assert [(call.phase, call.operation) for call in gathers] == [("forward", "_allgather_base_")]
    assert _reductions_of_the_head(calls) == ["backward"]


def test_fsdp_gathers_a_tied_head_once_and_reduces_its_gradient_once(calls_of: Callable[..., Any]) -> None:
    """Neither the loss nor an embedding reads its weight in backward."""
    calls = calls_of(TIED)
    gathers = [(call.phase, call.operation) for call in calls if call.parameter == "student head"]
    assert gathers == [("forward", "_allgather_base_")]
    assert _reductions_of_the_head(calls) == ["backward"]


def _reductions_of_the_head(calls: list[Any]) -> list[str]:
    """Their phases. The gradient is padded to equal shards."""
    rows = -(-VOCAB_SIZE // 2) * 2
    return [call.phase for call in calls if "reduce_scatter" in call.operation and call.numel == rows * STUDENT_WIDTH]


@pytest.mark.parametrize("case", PAIRS["deepspeed"], ids=lambda case: case.name)
def test_zero3_gathers_every_parameter_once(calls_of: Callable[..., Any], case: Case) -> None:
    gathers = [call for call in calls_of(case) if "gather" in call.operation]
    share = sum(-(-p.numel() // case.ranks) for model in make_models(case.architecture) for p in model.parameters())
    assert sum(call.numel for call in gathers) == share
    assert all(call.phase == "forward" for call in gathers)


@pytest.mark.parametrize("case", PAIRS["deepspeed"], ids=lambda case: case.name)
def test_zero3_reduces_every_gradient_once(calls_of: Callable[..., Any], case: Case) -> None:
    reduced = [call for call in calls_of(case) if "reduce" in call.operation and call.numel > 1]
    student = make_models(case.architecture)[0]
    student.get_input_embeddings().requires_grad_(False)
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    assert all(call.phase == "backward" for call in reduced)
    assert sum(call.numel for call in reduced) == sum(trained)


@pytest.mark.parametrize("name", list(PAIRS))
def test_chunks_call_no_collectives(calls_of: Callable[..., Any], name: str) -> None:
    many, one = (calls_of(case) for case in PAIRS[name])
    assert many == one
    assert len(many) > 0
