"""Ids that a model has no embedding for, found in the data before any kernel reads beyond its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


class VocabularyError(ValueError):
    """A model has no embedding for an id that occurs."""


_CURES = {
    "student": "give it more token ids (student.from_config.vocab_size, or resize_token_embeddings and save it), or "
    "take the token out of the text",
    "teacher": "take the token out of the text, or use a teacher that knows it",
}


def check_ids(
    ids: np.ndarray,  # int [n]
    embedded: Mapping[str, int],
    *,
    where: Callable[[int], str],
    token: Callable[[int], object],
    what: str,
) -> None:
    """Refuse ids that a model cannot embed, before any kernel reads beyond its weight.

    Args:
        ids: token ids, as labels or as inputs.
        embedded: role ("student", "teacher") -> the number of token ids it embeds.
        where: place in `ids` -> the words for it.
        token: id -> its text.
        what: what `ids` are, for the error.

    Raises:
        VocabularyError: with the first place, the id, its token and what to do, one line per model that lacks it.
    """
    faults = []
    for role, size in embedded.items():
        places = np.flatnonzero(ids >= size)
        if len(places):
            first, unknown = int(places[0]), int(ids[places[0]])
            faults.append(
                f"{what}: {where(first)} is id {unknown} ({token(unknown)!r}), but the {role} embeds ids 0 to "
                f"{size - 1} only ({len(places)} such token(s) in all): {_CURES[role]}"
            )
    if faults:
        raise VocabularyError("\n".join(faults))
