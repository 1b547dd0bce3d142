"""What ranks that hold different columns of a row must tell each other of it; see `sharded_row_pass`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kd_plugin.divergences.definition import Row
from kd_plugin.divergences.objective import Objective, Term


class Kind(NamedTuple):
    """One of the student's softmaxes."""

    temperature: float
    over_all: bool
    """Over all of the student's token ids, though the teacher has fewer."""


def student_softmaxes(objective: Objective, unequal: bool) -> tuple[Kind, ...]:
    """The student's softmaxes that are needed, in the order in which they are exchanged."""
    temperatures = {term.temperature for term in soft_terms(objective)}
    wants_all = bool(objective.hard_weight or objective.measured)
    if wants_all and not unequal:
        temperatures.add(1.0)
    over_shared = tuple(Kind(temperature, False) for temperature in sorted(temperatures))
    return (*over_shared, Kind(1.0, True)) if wants_all and unequal else over_shared


def teacher_temperatures(objective: Objective) -> tuple[float, ...]:
    """Temperatures at which the teacher's softmax is needed, ascending."""
    return tuple(
        sorted({term.temperature for term in soft_terms(objective)} | ({1.0} if objective.measured else set()))
    )


def soft_terms(objective: Objective) -> tuple[Term, ...]:
    """Terms of the soft loss that read the teacher at all."""
    return objective.terms if objective.needs_teacher else ()


def chained(objective: Objective) -> list[Term]:
    """Terms whose values travel with the moments."""
    return [term for term in soft_terms(objective) if term.divergence.chain_rule]


def summed(objective: Objective) -> list[Term]:
    """Terms whose sums take a round of their own."""
    about = ((term, term.divergence) for term in soft_terms(objective))
    return [term for term, divergence in about if not (divergence.chain_rule or divergence.gradient_without_sums)]


def has_sums(objective: Objective) -> bool:
    """Whether there is a second round."""
    return bool(summed(objective))


def exchanged_numbers(objective: Objective, unequal: bool = False) -> tuple[int, int]:
    """How many numbers of a row every rank gathers from all, the label's logit included, and how many it adds up.

    `unequal` says that the student has token ids that the teacher lacks.
    """
    one = torch.zeros(1, 1)
    row = Row(one, one, one, one, one, one, 1)
    softmaxes = len(student_softmaxes(objective, unequal)) + len(teacher_temperatures(objective))
    others = bool(objective.measured) + bool(objective.hard_weight) + len(chained(objective))
    return 2 * softmaxes + others, sum(len(t.divergence.elements(torch, row)) for t in summed(objective))
