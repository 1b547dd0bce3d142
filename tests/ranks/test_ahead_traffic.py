"""A teacher that runs ahead is gathered once per forward; the ranks agree on how many micro-batches it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import ahead_probes
from tests.ranks.launch import Launch, Launched
from tests.tiny_runs import make_folder

LAUNCHES = {
    "two": Launch(
        ahead_probes,
        ranks=2,
        spec=["received", "gradients", "received_zero3", "agreed"],
        prepare=make_folder,
        together="deepspeed",
        needs_deepspeed=True,
    ),
    "four": Launch(
        ahead_probes,
        ranks=4,
        spec=["received", "gradients", "received_zero3", "agreed"],
        prepare=make_folder,
        needs_deepspeed=True,
    ),
}
RANKS = ["two", pytest.param("four", marks=pytest.mark.slow)]
CASES = [f"{name}, {mode}" for name in ("fsdp", "fsdp1", "zero3") for mode in ("weight", "stats")]
CASES += ["fsdp frozen, weight"]


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_the_teachers_bytes_fall_by_the_accumulation_factor(
    launched: Callable[[str], Launched], name: str, case: str
) -> None:
    ranks, times = LAUNCHES[name].ranks, ahead_probes.MICRO_BATCHES
    share = (ranks - 1) / ranks
    for everything in launched(name).file("received_zero3.pt" if "zero3" in case else "received.pt"):
        found = everything[case]
        head = share * 4 * found["head"] * ("weight" in case)  # once per step, however many forwards
        backbone = share * 4 * (found["numel"] - found["head"])
        for forwards in (4, 2, 1):
            assert found[f"{forwards} forwards"] == pytest.approx(forwards * backbone + head, rel=0.03), forwards
        rest = found["as the student"] - found["student"]
        again = share * 4 * found["student head"] * ("frozen" in case)  # else its gather and gradient come with each
        expected = times * (backbone + head) + (times - 1) * again
        assert rest == pytest.approx(expected, rel=0.03), "what the teacher receives in each"
        assert found["same losses"]


@pytest.mark.parametrize("name", RANKS)
def test_a_frozen_head_that_is_kept_gives_the_same_gradients(launched: Callable[[str], Launched], name: str) -> None:
    for equal in launched(name).file("gradients.pt"):
        assert equal and all(equal)


@pytest.mark.parametrize("name", RANKS)
def test_ranks_agree_on_the_number_of_the_one_with_least_memory(launched: Callable[[str], Launched], name: str) -> None:
    """Of four micro-batches on each of two ranks, three fit on the last: two and two."""
    everyone = launched(name).file("agreed.pt")
    assert [together for together, _ in everyone] == [2] * LAUNCHES[name].ranks
    assert all(losses == everyone[0][1] for _, losses in everyone)
