"""A rank that is left alone is told so: which collective, where it was, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import guards_worker
from tests.ranks.guards_worker import TIMEOUT_S, WAYS
from tests.ranks.launch import Launch, Launched

LAUNCHES = {"guards": Launch(guards_worker, ranks=2, together="torch")}

NAMED = {
    "ends early, weight": ("all-reduce of numbers of valid tokens", "pass num_items_in_batch", "exchange weight"),
    "ends early, logits": ("all-gather of counts of valid rows", "16 valid rows here", "exchange logits"),
    "ends early, stats": ("all-gather of counts of valid rows", "18 rows, exchange stats, chunk_size 5"),
    "metrics": ("all-reduce of metrics",),
    "first step": ("all-gather of settings of the loss", "exchange stats"),
    "fails, stats": ("/4 of 5 rows, 16 valid rows here", "exchange stats"),
    "fails, logits": ("chunk 3/4 of 5 rows, 16 valid rows here", "the teacher's logits", "exchange logits"),
    "ends early, fsdp": ("a collective of the student's or the teacher's wrapper in its forward", "exchange weight"),
}


@pytest.fixture(scope="module")
def reports(launched: Callable[[str], Launched]) -> list[dict[str, dict[str, Any]]]:
    """Those of both ranks."""
    return launched("guards").file("alone.pt")


@pytest.mark.parametrize("name", WAYS)
def test_a_rank_left_alone_learns_what_it_waited_for(reports: list[dict[str, dict[str, Any]]], name: str) -> None:
    alone, other = (report[name] for report in reports)
    assert alone["kind"] == "CollectiveError"
    for words in (*NAMED[name], "rank 0 of 2", "ended its epoch early", "ignore_index", "drop_last"):
        assert words in alone["message"], alone["message"]
    assert "\n" not in alone["message"]
    assert alone["seconds"] < TIMEOUT_S + 5
    assert other["message"] == ("planted" if name.startswith("fails") else "")


@pytest.mark.parametrize("name", WAYS)
def test_what_the_backend_said_is_kept(reports: list[dict[str, dict[str, Any]]], name: str) -> None:
    alone = reports[0][name]
    kind, _, text = alone["cause"].partition(": ")
    assert kind in ("RuntimeError", "DistBackendError") and re.search("Timed out waiting 2000ms|timeout", text)
    assert text.splitlines()[0].rstrip(".") in alone["message"]
