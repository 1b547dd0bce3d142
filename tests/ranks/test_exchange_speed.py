"""Statistics are faster than weights where rows are few, and a slow network is hidden behind the chunks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import exchange_speed_worker as worker
from tests.ranks.launch import Launch, Launched

pytestmark = pytest.mark.slow

LAUNCHES = {"speed": Launch(worker, ranks=2)}


@pytest.fixture(scope="module")
def ranks(launched: Callable[[str], Launched]) -> list[dict[str, Any]]:
    """What each rank measured."""
    return launched("speed").file("found.pt")


def test_statistics_take_less_time_than_weights(ranks: list[dict[str, Any]]) -> None:
    """0.5 on a quiet machine; both modes of a round meet the same noise."""
    seconds = ranks[0]["race"]
    ratios = [stats / weight for stats, weight in zip(seconds["stats"], seconds["weight"], strict=True)]
    assert len(ratios) == worker.ROUNDS
    assert statistics.median(ratios) <= 0.8, seconds


@pytest.mark.parametrize(
    ("mode", "collective"), [("logits", "all_gather"), ("logits", "all_to_all"), ("stats", "all_gather")]
)
def test_at_least_half_of_a_slow_exchange_is_hidden(ranks: list[dict[str, Any]], mode: str, collective: str) -> None:
    """Each collective arrives half a chunk's time late. Asked for and waited for at once, all of it would be seen."""
    for found in (rank["overlap"][mode][collective] for rank in ranks):
        assert found["asked"] == worker.CHUNKS
        assert found["delay"] > 1e-3, "too short to measure"
        assert found["waited"] <= 0.5 * found["delay"] * found["asked"], found
