"""In their first step ranks refuse together what does not fit together, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import first_step_probes
from tests.ranks.launch import Launch, Launched

LAUNCHES = {
    "two": Launch(first_step_probes, ranks=2, spec=["mismatch", "hooks"], together="torch"),
    "four": Launch(first_step_probes, ranks=4, spec=["mismatch"]),
}


@pytest.mark.parametrize("launch_name", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_ranks_that_do_not_fit_together_are_refused_by_name(
    launched: Callable[[str], Launched], launch_name: str
) -> None:
    words = {name: f"distill.{name}" for name in ("divergence", "exchange", "chunk_size", "metrics", "loss_memory_mb")}
    words |= {
        f"{side} {what}": f"the {side}'s {what}" for side in ("student", "teacher") for what in ("vocabulary", "width")
    }
    words |= {"dtype": "the dtype of the student's head"}
    ranks = LAUNCHES[launch_name].ranks
    for found in launched(launch_name).file("mismatch.pt"):
        assert {unit for _, unit in found} == set(first_step_probes.UNITS)
        for (planted, _), (message, seconds) in found.items():
            name = planted.split(",")[0]
            assert words.get(name, name) in message, planted
            assert f"rank {ranks - 1}:" in message and "\n" not in message, message
            assert seconds < 10


def test_what_waits_for_the_first_step_neither_hangs_a_rank_alone_nor_stays(
    launched: Callable[[str], Launched],
) -> None:
    for found in launched("two").file("hooks.pt"):
        assert found == {"ddp": 0, "copies": 0, "fsdp2 root": 0}
