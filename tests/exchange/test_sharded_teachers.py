"""Slices of a teacher's logits that its ranks bring themselves."""

from __future__ import annotations

import pytest
import torch

import kd_plugin as kd
from kd_plugin.loss.chunk_plan import local_plan


def test_slices_of_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ShardedLogits got \(2, 3, 5\); wanted \[rows, columns of this rank\]"):
        kd.ShardedLogits(torch.zeros(2, 3, 5), widths=[5])
    teacher = kd.ShardedLogits(torch.zeros(4, 5), group=object(), widths=[5])
    with pytest.raises(ValueError, match="ShardedLogits has 4 rows, the student 3"):
        teacher.prepare(local_plan(None, 3, 2), 5, torch.float32)
