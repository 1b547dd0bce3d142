"""Ids that a model has no embedding for, found in the data before any kernel reads beyond its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np


class VocabularyError(ValueError):
    """A model has no embedding for an id that occurs."""


_CURES = {
    "student": "give it more token ids (student.from_config.vocab_size, or resize_token_embeddings and save it), or "
    "take the token out of the text",
    "teacher": "take the token out of the text, or use a teacher that knows it",
}


def check_ids(
    parts: Iterable[tuple[int, np.ndarray]],
    embedded: Mapping[str, int],
    *,
    where: Callable[[int], str],
    token: Callable[[int], object],
    what: str,
) -> None:
    """Refuse ids that a model cannot embed, before any kernel reads beyond its weight.

    Args:
        parts: the place of the first of some token ids, and these, int [n]; in ascending order of places.
        embedded: role ("student", "teacher") -> the number of token ids it embeds.
        where: place -> the words for it.
        token: id -> its text.
        what: what the ids are, for the error.

    Raises:
        VocabularyError: with the first place, the id, its token and what to do, one line per model that lacks it.
    """
    number = dict.fromkeys(embedded, 0)
    first: dict[str, tuple[int, int]] = {}  # place and id
    for begin, ids in parts:
        for role, size in embedded.items():
            places = np.flatnonzero(ids >= size)
            if len(places) and not number[role]:
                first[role] = (begin + int(places[0]), int(ids[places[0]]))
            number[role] += len(places)
    faults = [
        f"{what}: {where(first[role][0])} is id {(unknown := first[role][1])} ({token(unknown)!r}), but the {role} "
        f"embeds ids 0 to {size - 1} only ({number[role]} such token(s) in all): {_CURES[role]}"
        for role, size in embedded.items()
        if number[role]
    ]
    if faults:
        raise VocabularyError("\n".join(faults))
