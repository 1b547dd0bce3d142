"""Under every wrapper and with every exchange, several ranks train like one dense process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import exchange_worker
from tests.ranks.exchange_cases import RAGGED, Case, count_valid, make_batch, make_models, train_densely
from tests.ranks.exchange_launches import (
    BF16,
    MODES,
    QUICK,
    QUICK_BF16,
    RAGGED_RANKS,
    SLOW,
    autocast_cases,
    bf16_cases,
)
from tests.ranks.launch import Launch

LAUNCHES = {
    name: Launch(
        exchange_worker,
        ranks=cases[0].ranks,
        spec={"train": cases},
        together=name if name in QUICK else "",
        needs_deepspeed=any(case.wrapper.startswith("zero") for case in cases),
        timeout_s=800,
    )
    for name, cases in {**QUICK, **SLOW}.items()
}
CASES = [case for cases in QUICK.values() for case in cases]
SLOW_CASES = [case for cases in SLOW.values() for case in cases]


OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def params(wanted: Callable[[Case], bool]) -> list[Any]:
    """The launched cases of which `wanted` is true, slow where their launch is."""
    slow = (pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES if wanted(case))
    return [*filter(wanted, CASES), *slow]


@functools.cache
def truth(case: Case) -> dict[str, Tensor]:
    """The dense training, once for all cases that differ only in how they are wrapped."""
    return train_densely(case)


def dense(case: Case) -> dict[str, Tensor]:
    if case.batch == "split":  # the same sequences, whoever has them
        case = replace(case, ranks=1, accumulation=1)
    common = {
        "wrapper": "",
        "exchange": "weight",
        "dtype": "float32",
        "chunk_size": 5,
        "teacher": "shard",
        "autocast": False,
    }
    return truth(replace(case, **common, loss="dense"))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())


def root_of_squares(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Their distance over all parameters."""
    return sum(float((found[name].double() - value).square().sum()) for name, value in expected.items()) ** 0.5


@pytest.mark.parametrize(
    "case", params(lambda case: case.dtype == "float32" and not case.autocast), ids=lambda case: case.name
)
def test_every_wrapper_and_exchange_trains_like_one_dense_process(result_of: Callable[..., Any], case: Case) -> None:
    found, expected = result_of(case), dense(case)
    tolerance = 1e-6 if case.batch == "split" else 1e-5
    assert distance(found["parameters"], expected) < tolerance
    start = dict(make_models(case)[0].named_parameters())
    assert max((start[name] - value).abs().max() for name, value in expected.items()) > 1e-3


@pytest.mark.parametrize(
    ("wrapper", "tied", "ranks"),
    [which if which in QUICK_BF16 else pytest.param(*which, marks=pytest.mark.slow) for which in BF16],
)
def test_bf16_errs_as_much_as_the_wrapper_with_a_dense_loss(
    result_of: Callable[..., Any], wrapper: str, tied: bool, ranks: int
) -> None:
    def error(case: Case) -> float:
        return root_of_squares(result_of(case)["parameters"], dense(case))

    errors = {name: sum(map(error, cases)) for name, cases in bf16_cases(wrapper, tied=tied, ranks=ranks).items()}
    assert errors["dense"] > 1e-3, "bf16 that changes nothing would test nothing"
    for mode in MODES:
        assert errors[mode] <= 1.2 * errors["dense"], errors


def test_each_exchange_follows_autocast(result_of: Callable[..., Any]) -> None:
    """The modes round the same operands, and so agree with each other better than with the models in fp32."""
    cases = {name: case for name, (case,) in autocast_cases("alone").items()}
    found = {name: result_of(case)["parameters"] for name, case in cases.items()}
    exact = dense(cases["weight"])
    errors = {name: root_of_squares(parameters, exact) for name, parameters in found.items()}
    assert errors["dense"] > 1e-4, "autocast that changes nothing would test nothing"
    for mode in MODES:
        assert errors[mode] <= 1.2 * errors["dense"], errors
        assert root_of_squares(found[mode], found["weight"]) < 0.1 * errors["weight"], errors


def cuts_the_teacher(case: Case) -> bool:
    if case.wrapper == "ddp" or case.loss == "dense" or case.ranks == 1:
        return False
    return case.teacher != "part" or case.wrapper in ("fsdp1", "zero3")


@pytest.mark.parametrize("case", params(cuts_the_teacher), ids=lambda case: case.name)
def test_the_teacher_is_sharded_again_after_each_step(result_of: Callable[..., Any], case: Case) -> None:
    if case.wrapper == "grouped" and case.exchange != "weight" and OLD_TORCH:
        pytest.skip("before torch 2.13 a unit whose last module does not run stays whole until its next forward")
    assert result_of(case)["whole_in_teacher"] == []


@pytest.mark.parametrize("case", RAGGED_RANKS, ids=lambda c: c.name)
def test_ragged_ranks_wait_for_nobody(result_of: Callable[..., Any], case: Case) -> None:
    found = [int((make_batch(case, 0, 0, rank)[1][:, 1:] != -100).sum()) for rank in range(4)]
    assert tuple(found) == RAGGED and count_valid(case, 0) == sum(RAGGED)
    assert result_of(case)["seconds"] < 20
