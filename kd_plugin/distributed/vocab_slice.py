"""Which slice of the vocabulary each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist


class Sizes(NamedTuple):
    """Token ids of whole rows, of all ranks together."""

    student: int
    shared: int
    """The first so many of the student's, which the teacher has too; without a teacher, all of them."""

    @property
    def unequal(self) -> bool:
        """Whether the student has ids that the teacher lacks."""
        return self.shared < self.student


@dataclass(frozen=True)
class VocabShard:
    """Token ids `[start, stop)` of the student's vocabulary, held by this rank of `group`."""

    start: int
    stop: int
    sizes: Sizes
    """Of the vocabularies, whole."""
    teacher_bounds: list[int]
    """First of the teacher's token ids on each rank, and the end of those that the student has, too."""
    group: dist.ProcessGroup | None
    rank: int
    world_size: int

    @property
    def size(self) -> int:
        """Columns of this rank; the last ranks may have fewer, or none."""
        return self.stop - self.start

    @property
    def of_teacher(self) -> slice:
        """Token ids of this rank that the teacher has, too; none where the student alone has these."""
        return slice(*self.teacher_bounds[self.rank : self.rank + 2])

    @property
    def teacher_columns(self) -> int:
        """Their number."""
        return self.of_teacher.stop - self.of_teacher.start


def cut(student_size: int, teacher_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    """Rows of the student's head as FSDP2 cuts them (`torch.chunk`), and those of them that the teacher has."""
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = Sizes(student_size, student_size if teacher_size is None else min(student_size, teacher_size))
    length = -(-student_size // ranks)
    bounds = [min(index * length, student_size) for index in range(ranks + 1)]
    of_teacher = [min(bound, sizes.shared) for bound in bounds]
    return VocabShard(bounds[rank], bounds[rank + 1], sizes, of_teacher, group, rank, ranks)
