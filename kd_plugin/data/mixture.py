"""Several sources of training text as one, in which each has its share of the tokens.

Notable decisions:
- a weight is a share of tokens, not of documents, because the loss is a mean over tokens;
- every document is read: the source that has the most tokens for its weight is read once, and the documents of the
  others are repeated, whole, until each has its share to within one document. How often is said;
- the sources lie side by side all along the mixture, each document where its share says. Which of them a step reads
  follows from seed and step, as with one source.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from kd_plugin.data.packing import Document
from kd_plugin.data.record import DataError

__all__ = ["Part", "mixed", "without"]

logger = logging.getLogger(__name__)

_MOST_REPEATS = 100
_MOST_TOKENS = 10
"""The mixture may have this many times the tokens of its parts, since it is held whole."""


class Part(NamedTuple):
    """The documents of one source, and its weight."""

    name: str
    weight: float
    documents: list[Document]


def mixed(parts: Sequence[Part]) -> list[Document]:
    """The documents of all parts, repeated such that each part has its share of the tokens.

    Raises:
        DataError: a part would be repeated so often that the weights are most likely a mistake.
    """
    if len(parts) == 1:
        return parts[0].documents
    sizes = [sum(len(document.input_ids) for document in part.documents) for part in parts]
    per_weight = max(size / part.weight for size, part in zip(sizes, parts, strict=True))
    wanted = [part.weight * per_weight for part in parts]
    total = sum(part.weight for part in parts)
    repeats = [tokens / size for size, tokens in zip(sizes, wanted, strict=True)]
    if max(repeats) > _MOST_REPEATS or sum(wanted) > _MOST_TOKENS * sum(sizes):
        worst = repeats.index(max(repeats))
        name, weight, _ = parts[worst]
        raise DataError(
            f"{name}: for its weight, {weight:g} of {total:g}, its {sizes[worst]} tokens would be "
            f"repeated {repeats[worst]:.1f} times; lower the weight, or give more text"
        )
    for part, times in zip(parts, repeats, strict=True):
        logger.info("%s: %.1f %% of the tokens, its documents %.2f times", part.name, 100 * part.weight / total, times)
    placed = [
        (place, number, document)
        for number, (part, tokens) in enumerate(zip(parts, wanted, strict=True))
        for place, document in _placed(part.documents, tokens)
    ]
    placed.sort(key=lambda item: item[:2])
    return [document for _, _, document in placed]


def without(parts: Sequence[Part], held_out: Sequence[Document]) -> list[Part]:
    """`parts` without copies of documents held out, which may be of another part.

    Raises:
        DataError: nothing is left of a part.
    """
    if len(parts) == 1:  # which has been split by content
        return list(parts)
    chosen = {document.digest() for document in held_out}
    kept = [
        part._replace(documents=[document for document in part.documents if document.digest() not in chosen])
        for part in parts
    ]
    for part in kept:
        if not part.documents:
            raise DataError(
                f"{part.name}: all of its documents are held out, from it or as copies from another source; name "
                "held-out text with data.eval"
            )
    return kept


def _placed(documents: Sequence[Document], tokens: float) -> list[tuple[float, Document]]:
    """Documents of about so many `tokens`, each with its middle's place in the mixture, from 0 to 1."""
    by_content = sorted(documents, key=Document.digest)  # so that those of an incomplete round are no particular ones
    found: list[tuple[float, Document]] = []
    size = 0
    for number, document in enumerate(itertools.chain(documents, itertools.cycle(by_content))):
        middle = size + len(document.input_ids) / 2
        # Nearer to the wanted number with it than without; the first round is always complete.
        if number >= len(documents) and middle > tokens:
            break
        found.append((middle / tokens, document))
        size += len(document.input_ids)
    return found
