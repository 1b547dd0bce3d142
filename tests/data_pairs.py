"""Conversations of which the teacher reads another text, of random tokens."""

from __future__ import annotations

import numpy as np

from kd_plugin.data.corpus import Document, TeacherText
from tests.tiny_models import VOCAB


def make_pairs(count: int = 11, seed: int = 0) -> list[Document]:
    """Prompts of 2 to 7 tokens, other ones for the teacher, an answer or two of 1 to 5 tokens."""
    generator, documents = np.random.default_rng(seed), []
    for number in range(count):
        sides: list[list[np.ndarray]] = [[], []]
        marks: list[list[np.ndarray]] = [[], []]
        for _ in range(1 + number % 2):
            answer = generator.integers(3, VOCAB, generator.integers(1, 6))
            for side, mark in zip(sides, marks, strict=True):
                prompt = generator.integers(3, VOCAB, generator.integers(2, 8 - 3 * (number % 2)))
                side += [prompt, answer]
                mark += [np.zeros(len(prompt), dtype=bool), np.ones(len(answer), dtype=bool)]
        (ids, theirs), (trained, others) = map(np.concatenate, sides), map(np.concatenate, marks)
        at = np.full(len(ids), -1, dtype=np.int64)
        at[trained] = np.flatnonzero(others)
        documents.append(Document(ids.astype(np.int32), trained, "", TeacherText(theirs.astype(np.int32), at)))
    return documents
