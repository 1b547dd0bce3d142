"""What one rank alone runs into, all ranks act on alike: broken weights, a missing checkpoint, an older processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ranks import safeguards_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.safeguards_worker import IDS, LAYOUTS
from tests.tiny_runs import make_folder

LAUNCHES = {
    "safeguards": Launch(safeguards_worker, ranks=2, prepare=make_folder, together="deepspeed", needs_deepspeed=True)
}


@pytest.fixture(scope="module")
def found(launched: Callable[[str], Launched]) -> list[dict[str, Any]]:
    """What both ranks found."""
    return launched("safeguards").file("found.pt")


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_ranks_stop_in_the_same_step_and_save_nothing_broken(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        run = rank[name]
        assert run["kind"] == "DivergedError", run
        assert "diverged at step 4" in run["message"] and "step_00000002, from which" in run["message"]
        assert run["left"] == ["step_00000002"]
        assert run["seen"] == [True, False], "each rank hears of the other's weights"


def test_all_ranks_resume_what_rank_0_sees(found: list[dict[str, Any]]) -> None:
    """A newer folder that is on another rank's disk only, as one left by an earlier run, is not taken."""
    assert [rank["resume_0"]["result"] for rank in found] == [[2, 3], [2, 3]]


def test_a_rank_without_the_checkpoint_is_named_on_all(found: list[dict[str, Any]]) -> None:
    for rank in found:
        run = rank["resume_1"]
        assert run["kind"] == "CheckpointError"
        assert "step_00000002" in run["message"] and "is not there on rank 1" in run["message"]


def test_an_older_processor_makes_all_ranks_compute_alike(found: list[dict[str, Any]]) -> None:
    for rank in found:
        (native, _), (mixed, gradient), (emulated, expected) = (
            rank[str(case)] for case in ((True, True), (True, False), (False, False))
        )
        assert (native, mixed, emulated) == (True, False, False)
        assert torch.equal(gradient, expected)


def test_peaks_are_the_largest_of_any_rank(found: list[dict[str, Any]]) -> None:
    small, large = (rank["peaks"] for rank in found)
    assert small["alone"] < large["alone"] == small["peak"] == large["peak"]
    rows, columns = IDS[:, 1:].numel(), 37
    assert small["avoided"] == large["avoided"] == 2 * 4 * rows * columns / 2**30
