"""The teacher of a trainer ahead of its student, and the labels that a batch is counted by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_plugin.hf import DistillTrainer
from kd_plugin.hf.batches import counted_as_read, without_repeats
from kd_plugin.plugin.labels import Convention
from tests.hf_runs import Reference, approximately, assert_same_parameters, history, make_rows, trainer_of


@pytest.mark.parametrize(
    ("together", "calls"),
    [pytest.param(1, 12, marks=pytest.mark.slow), (2, 4 + 2 + 2), pytest.param(4, 4 + 1 + 1, marks=pytest.mark.slow)],
)
def test_the_teacher_reads_several_micro_batches_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, together: int, calls: int
) -> None:
    """From the second step on: the first settles what crosses the wire. The tensors are the student's very own."""
    trainer = trainer_of(DistillTrainer, tmp_path, teacher_micro_batches=together)
    called: list[int] = []
    trainer.plugin.teacher.model.register_forward_hook(lambda *_: called.append(1))
    trainer.train()
    reference = Reference(make_rows(40))
    assert len(called) == calls
    assert history(trainer) == approximately(reference.losses)
    assert_same_parameters(trainer.model.state_dict(), reference.student)
    assert "runs again" not in caplog.text


def test_labels_that_a_mask_hides_are_not_counted_where_the_student_leaves_them_out() -> None:
    batch = {"labels": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    found = counted_as_read(batch, Convention(shift=False, masked=True))
    assert found["labels"].tolist() == [[5, 6, -100]] and batch["labels"].tolist() == [[5, 6, 7]]
    for convention in (None, Convention(shift=True)):
        assert counted_as_read(batch, convention) is batch


def ranks(rank: int, *, end: bool, remainder: int) -> Any:
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    return SimpleNamespace(gradient_state=state, num_processes=3, process_index=rank)


@pytest.mark.parametrize(
    ("remainder", "kept"), [(4, [2, 2, 0]), (3, [2, 1, 0]), (1, [1, 0, 0]), (0, [2, 2, 2]), (-1, [2, 2, 2])]
)
def test_rows_that_fill_the_last_batch_of_an_evaluation_do_not_count(remainder: int, kept: list[int]) -> None:
    """Three ranks with two rows each; a remainder of 0 or -1 says that nothing was filled up."""
    for rank, count in enumerate(kept):
        batch = {"input_ids": torch.ones(2, 3), "labels": torch.full((2, 3), 7), "shift_labels": torch.full((2, 3), 8)}
        last = without_repeats(batch, ranks(rank, end=True, remainder=remainder))
        assert [int((last[name] != -100).all(1).sum()) for name in ("labels", "shift_labels")] == [count, count]
        earlier = without_repeats(batch, ranks(rank, end=False, remainder=remainder))
        assert (earlier["labels"] == 7).all() and (last["input_ids"] == 1).all()
