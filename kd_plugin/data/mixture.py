"""Several sources of training text as one, in which each has its share of the tokens.

Notable decisions:
- a weight is a share of tokens, not of documents, because the loss is a mean over tokens;
- every document is read: the source that has the most tokens for its weight is read once, and the documents of the
  others are repeated, whole, until each has its share to within one document. How often is said;
- the sources lie side by side all along the mixture, each document where its share says. Which of them a step reads
  follows from seed and step, as with one source.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.record import DataError

__all__ = ["Part", "mixed", "without"]

logger = logging.getLogger(__name__)

_MOST_REPEATS = 100
_MOST_TOKENS = 10
"""The mixture may have this many times the tokens of its parts; more is most likely a mistake."""


class Part(NamedTuple):
    """The documents of one source, and its weight."""

    name: str
    weight: float
    documents: Sequence[Document]


def mixed(parts: Sequence[Part]) -> Corpus:
    """The documents of all parts, repeated such that each part has its share of the tokens.

    Raises:
        DataError: a part would be repeated so often that the weights are most likely a mistake.
    """
    corpora = [Corpus.of(part.documents) for part in parts]
    if len(parts) == 1:
        return corpora[0]
    sizes = [corpus.num_tokens for corpus in corpora]
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
    found = [_placed(corpus, tokens) for corpus, tokens in zip(corpora, wanted, strict=True)]
    begins = np.cumsum([0, *map(len, corpora)])
    documents = np.concatenate([chosen + begin for (chosen, _), begin in zip(found, begins[:-1], strict=True)])
    places = np.concatenate([place for _, place in found])
    # Stable: at the same place documents are in the order of the parts.
    return Corpus.joined(corpora).chosen(documents[np.argsort(places, kind="stable")])


def without(parts: Sequence[Part], held_out: Sequence[Document]) -> list[Part]:
    """`parts` without copies of documents held out, which may be of another part.

    Raises:
        DataError: nothing is left of a part.
    """
    if len(parts) == 1:  # which has been split by content
        return list(parts)
    chosen, kept = Corpus.of(held_out).column("digest"), []
    for part in parts:
        corpus = Corpus.of(part.documents)
        left = np.flatnonzero(~np.isin(corpus.column("digest"), chosen))
        kept.append(part._replace(documents=corpus.chosen(left)))
    for part in kept:
        if not part.documents:
            raise DataError(
                f"{part.name}: all of its documents are held out, from it or as copies from another source; name "
                "held-out text with data.eval"
            )
    return kept


def _placed(corpus: Corpus, tokens: float) -> tuple[np.ndarray, np.ndarray]:
    """Documents of about so many `tokens`, int [n], and each one's middle as its place in the mixture, from 0 to 1."""
    number, lengths = len(corpus), corpus.lengths
    # By content, so that those of an incomplete round are no particular ones.
    again = np.argsort(corpus.column("digest"), kind="stable")
    rounds = int(tokens // lengths.sum()) + 1
    documents = np.concatenate([np.arange(number), np.tile(again, rounds)])
    repeated = lengths[documents]
    middles = np.cumsum(repeated) - repeated / 2
    # Nearer to the wanted number with it than without; the first round is always complete.
    stop = max(number, int(np.searchsorted(middles, tokens, side="right")))
    return documents[:stop], middles[:stop] / tokens
