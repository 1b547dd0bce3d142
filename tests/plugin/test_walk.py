"""How a step walks through the package's folders: what is called from where.

A call enters a folder when it comes from another folder of the package, or from outside of it (torch, Transformers).
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

import kd_plugin as kd
from tests.tiny_models import make_model

PACKAGE = Path(kd.__file__).parent
FLOORS = ("plugin", "exchange", "loss", "row_kernels", "divergences", "distributed", "settings")


def folder_of(frame: FrameType) -> str:
    """The folder of the package that this call is in; "" outside of it."""
    file = Path(frame.f_code.co_filename)
    return file.relative_to(PACKAGE).parts[0] if file.is_relative_to(PACKAGE) else ""


def callers(frame: FrameType) -> Iterator[FrameType]:
    """This call and those around it, from the inside."""
    here: FrameType | None = frame
    while here is not None:
        yield here
        here = here.f_back


class Walk:
    """Calls into the package during one step, by (folder of the nearest caller in the package, own folder)."""

    def __init__(self) -> None:
        self.entries: collections.Counter[tuple[str, str]] = collections.Counter()
        self.stacks: list[list[str]] = []
        """Folders on the way to each row pass, neighbours that are alike once."""

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not (folder := folder_of(frame)):
            return
        inside = [name for each in callers(frame) if (name := folder_of(each))]
        if len(inside) > 1 and inside[1] != folder:
            self.entries[inside[1], folder] += 1
        if frame.f_code.co_name == "row_pass":
            self.stacks.append([name for name, _ in itertools.groupby(reversed(inside))])


@pytest.fixture(scope="module")
def walk() -> Walk:
    """A step of an attached student, the second one."""
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager", chunk_size=5))
    input_ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    student.train()
    student(input_ids, labels=input_ids).loss.backward()
    walked = Walk()
    sys.setprofile(walked)
    try:
        student(input_ids, labels=input_ids)
    finally:
        sys.setprofile(None)
    return walked


def test_no_folder_calls_back_into_one_above_it(walk: Walk) -> None:
    """So `plugin` is entered by models alone: no closure of it is called from `exchange` or `loss`."""
    upwards = {pair for pair in walk.entries if FLOORS.index(pair[0]) > FLOORS.index(pair[1])}
    assert not upwards
    assert {pair[1] for pair in walk.entries} == set(FLOORS) - {"plugin"}


def test_hidden_states_pass_each_folder_once_on_their_way_to_a_chunk(walk: Walk) -> None:
    assert len(walk.stacks) == 4
    assert all(stack == ["plugin", "loss", "row_kernels"] for stack in walk.stacks)
