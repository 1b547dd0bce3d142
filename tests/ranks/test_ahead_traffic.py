"""A teacher that runs ahead is gathered once per forward; the ranks agree on how many micro-batches it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import ahead_probes
from tests.ranks.launch import Launch, Launched
from tests.tiny_runs import make_folder

QUICK = ["gradients", "received_zero3", "agreed"]
MORE = ["received", "received_prefetching"]


def _launch(ranks: int, spec: list[str]) -> Launch:
    together = "deepspeed" if spec == QUICK and ranks == 2 else ""
    return Launch(ahead_probes, ranks=ranks, spec=spec, prepare=make_folder, together=together, needs_deepspeed=True)


LAUNCHES = {
    "two": _launch(2, QUICK),
    "two more": _launch(2, MORE),
    "four": _launch(4, [*QUICK, *MORE]),
}
RANKS = ["two", pytest.param("four", marks=pytest.mark.slow)]
MORE_RANKS = [pytest.param(name, marks=pytest.mark.slow) for name in ("two more", "four")]
FSDP = [f"{name}, {mode}" for name in ("fsdp", "fsdp1") for mode in ("weight", "stats")] + ["fsdp frozen, weight"]
CASES = [pytest.param("two", f"zero3, {mode}") for mode in ("weight", "stats")]
CASES += [pytest.param("four", f"zero3, {mode}", marks=pytest.mark.slow) for mode in ("weight", "stats")]
CASES += [pytest.param(name, case, marks=pytest.mark.slow) for name in ("two more", "four") for case in FSDP]


@pytest.mark.parametrize(("name", "case"), CASES)
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
        assert found["same losses"]
        if "zero3" in case:  # what its student gathers again varies from step to step
            continue
        rest = found["as the student"] - found["student"]
        again = share * 4 * found["student head"] * ("frozen" in case)  # else its gather and gradient come with each
        expected = times * (backbone + head) + (times - 1) * again
        assert rest == pytest.approx(expected, rel=0.03), "what the teacher receives in each"


@pytest.mark.parametrize("name", MORE_RANKS)
def test_what_zero3_prefetches_comes_with_each_forward(launched: Callable[[str], Launched], name: str) -> None:
    """The head too, which the first forward of all has used."""
    ranks = LAUNCHES[name].ranks
    for everything in launched(name).file("received_prefetching.pt"):
        found = everything["zero3 prefetching, weight"]
        whole = (ranks - 1) / ranks * 4 * found["numel"]
        for forwards in (4, 2, 1):
            assert found[f"{forwards} forwards"] == pytest.approx(forwards * whole, rel=0.03), forwards


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
