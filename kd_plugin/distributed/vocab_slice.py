"""Which slice of the vocabulary each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from kd_plugin.distributed.layout import chunk_length


class Sizes(NamedTuple):
    """How many token ids the whole vocabularies have, all ranks' slices together."""

    student: int
    shared: int
    """The first so many of the student's token ids are the teacher's, too; without a teacher, all of them."""

    @property
    def unequal(self) -> bool:
        """Whether the student has ids that the teacher lacks."""
        return self.shared < self.student


@dataclass(frozen=True)
class VocabSlice:
    """Token ids `[start, stop)` of the student's vocabulary, held by this rank of `group`."""

    start: int
    stop: int
    sizes: Sizes
    teacher_bounds: list[int]
    """The first of the shared token ids on each rank, and the end of them on the last."""
    group: dist.ProcessGroup | None
    rank: int
    world_size: int

    @property
    def size(self) -> int:
        """How many token ids this rank holds; the last ranks may hold fewer, or none."""
        return self.stop - self.start

    @property
    def of_teacher(self) -> slice:
        """The token ids of this rank that the teacher has, too; empty where the student alone has them."""
        return slice(*self.teacher_bounds[self.rank : self.rank + 2])

    @property
    def teacher_columns(self) -> int:
        """How many token ids of this rank the teacher has, too: the columns of its logits here."""
        return self.of_teacher.stop - self.of_teacher.start


def cut(student_size: int, teacher_size: int | None, group: dist.ProcessGroup | None) -> VocabSlice:
    """This rank's slice of the student's vocabulary as FSDP2 cuts the head's weight (`torch.chunk`).

    Args:
        student_size: V.
        teacher_size: V' of the teacher's head; None without a teacher.
        group: the ranks that share the vocabulary; None: all.
    """
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = Sizes(student_size, student_size if teacher_size is None else min(student_size, teacher_size))
    length = chunk_length(student_size, ranks)
    bounds = [min(index * length, student_size) for index in range(ranks + 1)]
    of_teacher = [min(bound, sizes.shared) for bound in bounds]
    return VocabSlice(bounds[rank], bounds[rank + 1], sizes, of_teacher, group, rank, ranks)
