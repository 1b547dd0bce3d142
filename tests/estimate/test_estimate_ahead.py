"""What a teacher that reads several micro-batches at once holds and saves, by the estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kd_plugin.estimate.account import USABLE, Estimate, estimate
from kd_plugin.estimate.memory import memory
from kd_plugin.estimate.tables import notes_of
from kd_plugin.settings.units import GIB
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


def automatic(folder: Path, gpu_memory_gib: float | None) -> Estimate:
    """Of four micro-batches on two ranks, as many at once as fit."""
    train = {"micro_batch_size": SEQUENCES, "tokens_per_step": 4 * 2 * SEQUENCES * TOKENS, "parallel": "fsdp"}
    return estimate(run_config(folder, train=train), world_size=2, gpu_memory_gib=gpu_memory_gib, device="cpu")


def test_auto_takes_as_many_as_fit_and_says_so(folder: Path) -> None:
    whole = automatic(folder, None)
    assert whole.setup.together == 4
    assert "teacher ahead: reads 4 of 4 micro-batches at once, 1 forwards per step; auto, if they fit" in "\n".join(
        notes_of(whole)
    )
    peaks = {n: memory(replace(whole.setup, together=n)).peak_bytes for n in (1, 2, 4)}
    for enough in (*peaks.values(), min(peaks.values()) / 2):
        found = automatic(folder, enough / USABLE / GIB * (1 + 1e-9))
        expected = max((n for n in peaks if peaks[n] <= enough), default=1)
        assert found.setup.together == expected
        assert found.memory.peak_bytes == peaks[expected]
        assert f"reads {expected} of 4 micro-batches at once, {4 // expected} forwards" in "\n".join(notes_of(found))


def test_auto_counts_a_head_that_is_gathered_once(folder: Path) -> None:
    """So that `weight` is compared by what it moves."""
    config = automatic(folder, None).setup.config
    as_student = config.model_copy(update={"teacher": config.teacher.model_copy(update={"micro_batch_size": None})})
    head = 0.5 * 64 * 32 * 4
    ahead, other = (estimate(each, world_size=2, device="cpu").exchanges["weight"] for each in (config, as_student))
    assert other.num_bytes - ahead.num_bytes == pytest.approx(3 / 4 * head)
    assert "f V' E x 4 / 4" in ahead.how
