"""Whatever crosses the wire, the numbers are the same; also of larger students, compiled ones, changed teachers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import agreement_probes
from tests.ranks.launch import Launch, Launched
from tests.ranks.sharded_heads import MODES

LAUNCHES = {
    "two": Launch(
        agreement_probes,
        ranks=2,
        spec=["agreement", "chunk_sizes", "larger_student", "following_teacher", "tensor_parallel", "compiled"],
        together="torch",
    ),
    "two, elsewhere": Launch(agreement_probes, ranks=2, spec=["compiled_elsewhere"]),
    "four": Launch(agreement_probes, ranks=4, spec=["agreement", "tensor_parallel"], together="four"),
}


@pytest.mark.parametrize("name", ["two", "four"])
def test_every_exchange_gives_the_same_numbers(launched: Callable[[str], Launched], name: str) -> None:
    for found in launched(name).file("agreement.pt"):
        for mode in ("logits", "stats"):
            for one, other in zip(found[mode], found["weight"], strict=True):
                assert (one - other).abs().max() <= 1e-9 * other.abs().max()


def test_ranks_with_unequal_room_agree_on_the_smallest_chunk(launched: Callable[[str], Launched]) -> None:
    """Also an evaluation before the first step, where chunks have collectives."""
    for found in launched("two").file("chunk_sizes.pt"):
        for mode, (losses, expected, rows) in found.items():
            assert rows == 9, mode
            assert losses == pytest.approx(expected, rel=1e-12), mode


def test_every_exchange_gives_a_larger_student_the_same_numbers(launched: Callable[[str], Launched]) -> None:
    """Losses, the head's gradient, metrics, and the bytes of the logits that never were; also where rank 1 has nothing
    of the teacher's head."""
    for found in launched("two").file("larger_student.pt"):
        assert len(found) == len(agreement_probes.LARGER) * len(agreement_probes.SMALLER_TEACHERS) * len(MODES)
        for (name, size, _), (loss, gradient, metrics) in found.items():
            expected_loss, expected_gradient, expected_metrics = found[name, size, "weight"]
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            assert (gradient - expected_gradient).abs().max() <= 1e-9 * expected_gradient.abs().max()
            assert metrics == pytest.approx(expected_metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "probe", "places"),
    [
        ("two", "compiled", 2),
        pytest.param("two, elsewhere", "compiled_elsewhere", 3, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_student_trains_on_several_ranks(
    launched: Callable[[str], Launched], name: str, probe: str, places: int
) -> None:
    """Settling what the ranks agree on is left to eager code."""
    for found in launched(name).file(f"{probe}.pt"):
        assert len(found) == places
        for place, (loss, plain) in found.items():
            assert loss == pytest.approx(plain, rel=1e-5), place


def test_what_is_written_to_a_teacher_between_steps_counts_in_every_exchange(
    launched: Callable[[str], Launched],
) -> None:
    """Its rows are kept where it is whole: not beyond a change of them, as by a moving average of the student."""
    for found in launched("two").file("following_teacher.pt"):
        assert len(found) == 3 * len(MODES)
        for losses in found.values():
            assert all(loss == pytest.approx(expected, rel=1e-9) for loss, expected in losses)
            assert len({round(expected, 6) for _, expected in losses}) > 1


@pytest.mark.parametrize("name", ["two", "four"])
def test_a_tensor_parallel_teachers_slices_are_its_logits(launched: Callable[[str], Launched], name: str) -> None:
    for found in launched(name).file("tensor_parallel.pt"):
        assert len(found) == 6
        assert max(found.values()) < 1e-12, found
