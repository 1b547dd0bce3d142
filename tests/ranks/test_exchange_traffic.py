"""What the exchanges of a step send, to whom and in how many rounds, and what no rank then holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kd_plugin.exchange import cost
from tests.ranks import sharded_heads, traffic_probes
from tests.ranks.launch import Launch, Launched

LAUNCHES = {
    "two": Launch(traffic_probes, ranks=2, spec=["head_collectives", "memory", "counting", "rounds"], together="torch"),
    "four": Launch(traffic_probes, ranks=4, spec=["memory", "counting", "traffic", "groups"], together="four"),
}


def test_statistics_never_send_a_head_or_its_gradient(launched: Callable[[str], Launched]) -> None:
    rows = -(-sharded_heads.VOCAB_SIZE // 2) * 2
    for calls in launched("two").file("head_collectives.pt"):
        for mode, times in (("weight", 1), ("stats", 0)):
            for head in ("student head", "teacher head"):
                assert sum(call.parameter == head for call in calls[mode]) == times, (mode, head)
            reduced = [call for call in calls[mode] if "reduce_scatter" in call.operation]
            assert sum(call.numel == rows * sharded_heads.STUDENT_WIDTH for call in reduced) == times
            largest = max(call.numel for call in calls[mode])
            assert (largest >= rows // 2 * sharded_heads.STUDENT_WIDTH) == (mode == "weight")


@pytest.mark.parametrize("name", ["two", "four"])
def test_one_collective_settles_the_chunks_and_counts_the_tokens(
    launched: Callable[[str], Launched], name: str
) -> None:
    for found in launched(name).file("counting.pt"):
        for exchange, ways in found.items():
            (counted, calls), (given, fewer) = ways["counted"], ways["given"]
            assert counted == pytest.approx(LAUNCHES[name].ranks * given, rel=1e-6)
            assert len(calls) - len(fewer) == (exchange == "weight")
            assert len(calls) > 2


def test_a_chunk_of_statistics_takes_one_round_or_two(launched: Callable[[str], Launched]) -> None:
    """Besides the gather of the hidden states and the reduction of their gradient."""
    for found in launched("two").file("rounds.pt"):
        for divergence, rounds in traffic_probes.ROUNDS.items():
            gathers = ["_allgather_base_", "_allgather_base_"]
            expected = [*gathers, "_reduce_scatter_base_"] + ["allreduce_"] * (rounds - 1)
            assert sorted(expected) == found[divergence], divergence


@pytest.mark.parametrize("name", ["two", "four"])
def test_statistics_leave_no_rank_with_a_whole_head_or_row_of_logits(
    launched: Callable[[str], Launched], name: str
) -> None:
    ranks = LAUNCHES[name].ranks
    for shapes in launched(name).file("memory.pt"):
        vocab_size = sharded_heads.VOCAB_SIZE
        assert max(torch.Size(shape).numel() for shape in shapes) < vocab_size * sharded_heads.STUDENT_WIDTH
        matrices = [shape for shape in shapes if len(shape) > 1]  # the settings travel as a row of bytes
        assert not [shape for shape in matrices if any(size >= vocab_size for size in shape)]
        columns = -(-vocab_size // ranks)
        assert any(shape[-1:] in ((columns,), (vocab_size - columns * (ranks - 1),)) for shape in shapes)


def test_bytes_on_the_wire_are_those_of_the_formulas(launched: Callable[[str], Launched]) -> None:
    large = cost.Head(traffic_probes.TRAFFIC_VOCAB, traffic_probes.TRAFFIC_WIDTH, 4, item_bytes=4, reduced_bytes=4)
    small = cost.Head(traffic_probes.LOGITS_VOCAB, traffic_probes.LOGITS_WIDTH, 4, item_bytes=4, reduced_bytes=4)
    rows = traffic_probes.TRAFFIC_ROWS
    expected = {
        "weight": cost.weight_bytes(large, large._replace(reduced_bytes=0)),
        "stats": cost.stats_bytes(large, large, rows, ranks=4, numbers=sharded_heads.NUMBERS),
        "logits": cost.logits_bytes(small, small, traffic_probes.LOGITS_ROWS, ranks=4),
    }
    for counted in launched("four").file("traffic.pt"):
        assert counted == pytest.approx(expected, rel=0.05)
        assert 4 * counted["stats"] < counted["weight"]


def test_copies_of_sharded_models_exchange_within_their_group(launched: Callable[[str], Launched]) -> None:
    found = launched("four").file("groups.pt")
    for rank, sizes in enumerate(found):
        group = (0, 1) if rank < 2 else (2, 3)
        copies = (rank % 2, rank % 2 + 2)
        assert sizes["forward"] == {group}
        assert sizes["backward"] == {group, copies}, "the gradient of its rows goes to the other copy"
