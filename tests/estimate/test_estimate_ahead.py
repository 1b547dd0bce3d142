"""What a teacher that reads several micro-batches at once holds and saves, by the estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_plugin.estimate.account import Estimate, estimate
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config

SEQUENCES, TOKENS = 2, 32  # of a micro-batch, of a sequence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def estimated(folder: Path, together: int, *, ranks: int = 1, micro_batches: int = 4) -> Estimate:
    """With `together` micro-batches at once."""
    train = {"micro_batch_size": SEQUENCES, "tokens_per_step": micro_batches * ranks * SEQUENCES * TOKENS}
    config = run_config(folder, train=train, teacher={"micro_batch_size": together * SEQUENCES})
    return estimate(config, world_size=ranks, device="cpu", speeds=SPEEDS)


def bytes_of(estimated: Estimate, phase: str, name: str) -> float:
    return sum(line.num_bytes for line in estimated.memory.phases[phase] if line.name == name)


@pytest.mark.parametrize("together", [1, 2, 3, 4, 8])
def test_a_forward_holds_a_layer_of_as_many_micro_batches_as_it_reads(folder: Path, together: int) -> None:
    """Of four in a step: the first forward of three reads three."""
    name = "teacher, one layer's tensors"
    one = bytes_of(estimated(folder, 1), "teacher forward", name)
    assert bytes_of(estimated(folder, together), "teacher forward", name) == min(together, 4) * one > 0


def test_hidden_states_of_the_whole_step_are_kept(folder: Path) -> None:
    name = "teacher's hidden states"
    assert bytes_of(estimated(folder, 1), "loss", name) == 0
    assert bytes_of(estimated(folder, 2), "loss", name) == 4 * SEQUENCES * TOKENS * 32 * 4


@pytest.mark.parametrize(("together", "forwards"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_the_teacher_is_gathered_once_a_forward(folder: Path, together: int, forwards: int) -> None:
    def gathered(together: int) -> float:
        lines = estimated(folder, together, ranks=2).parameters
        return next(line.num_bytes for line in lines if line.name == "teacher gathered")

    assert gathered(together) == forwards * gathered(4)
