"""Estimated bytes and peaks against those of real steps of FSDP over gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.estimate.account import Estimate, estimate
from tests.ranks import estimate_worker
from tests.ranks.estimate_cases import BATCH, LENGTH, make_config, write_configurations
from tests.ranks.launch import Launch, Launched
from tests.round_speeds import SPEEDS

CASES = [(1, "weight"), *((ranks, exchange) for ranks in (2, 4) for exchange in ("weight", "logits", "stats"))]
CASES += [(4, f"{exchange}:2") for exchange in ("weight", "logits", "stats")]  # two copies of two shards
CASES += [(2, "weight@fsdp1"), (2, "stats@fsdp1")]
CASES += [(ranks, f"{case}+3") for ranks in (2, 4) for case in ("weight", "logits", "stats", "weight@fsdp1")]
CASES += [(4, f"{exchange}:2@fsdp1") for exchange in ("weight", "logits", "stats")]
PARAMS = [case if case[0] == 2 else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


LAUNCHES = {
    str(ranks): Launch(
        estimate_worker,
        ranks=ranks,
        spec=[case for count, case in CASES if count == ranks],
        prepare=write_configurations,
        together="torch" if ranks == 2 else "",
    )
    for ranks in (1, 2, 4)
}


def measured(launched: Callable[[str], Launched], ranks: int, case: str) -> dict[str, Any]:
    """What the first rank measured."""
    return launched(str(ranks)).file("measured.pt")[0][case]


def estimated(folder: Path, ranks: int, case: str) -> Estimate:
    # the last token of a sequence has no label
    return estimate(make_config(case, folder), world_size=ranks, rows=BATCH * (LENGTH - 1), device="cpu", speeds=SPEEDS)


@pytest.mark.parametrize(("ranks", "case"), PARAMS)
def test_the_bytes_of_a_step_are_the_estimates(launched: Callable[[str], Launched], ranks: int, case: str) -> None:
    found, exchange = estimated(launched(str(ranks)).folder, ranks, case), re.split("[:@+]", case)[0]
    received = sum(measured(launched, ranks, case)["received"].values())
    others = sum(line.num_bytes for line in found.parameters)
    assert found.setup.exchange == exchange
    for_heads = found.setup.accumulation * found.exchanges[exchange].num_bytes
    assert others + for_heads == pytest.approx(received, rel=0.01)
    if ranks > 1:  # what is left for the heads, the rest being the same in every mode
        assert for_heads == pytest.approx(received - others, rel=0.05)


@pytest.mark.parametrize(("ranks", "case"), PARAMS)
def test_the_peak_of_a_step_is_the_estimates(launched: Callable[[str], Launched], ranks: int, case: str) -> None:
    found = estimated(launched(str(ranks)).folder, ranks, case).memory
    assert found.worst_phase == "loss"
    assert found.phase_bytes("loss") == pytest.approx(measured(launched, ranks, case)["peak"], rel=0.15)
