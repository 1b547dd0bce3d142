"""Whether token ids mean the same thing on both sides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TokenizerMismatch", "VocabularyError", "check_tokenizers", "check_vocabulary"]

logger = logging.getLogger(__name__)


class TokenizerMismatch(ValueError):
    """An id means one token to the student and another to the teacher."""


class VocabularyError(ValueError):
    """A model has no embedding for some of the tokenizer's ids."""


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give one id different meanings; ids that only one of them has are reported.

    Raises:
        TokenizerMismatch: naming how many ids differ, and the first.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    student_tokens = {index: token for token, index in student_ids.items()}
    teacher_tokens = {index: token for token, index in teacher_ids.items()}
    both = student_tokens.keys() & teacher_tokens.keys()
    different = {index for index in both if student_tokens[index] != teacher_tokens[index]}
    # A token that moved to another id differs even where its old id is unused on the other side.
    for token in student_ids.keys() & teacher_ids.keys():
        if student_ids[token] != teacher_ids[token]:
            different.add(min(student_ids[token], teacher_ids[token]))
    if different:
        first, total = min(different), len(student_tokens.keys() | teacher_tokens.keys())
        raise TokenizerMismatch(
            f"the tokenizers differ at {len(different)} of {total} ids: id {first} is "
            f"{student_tokens.get(first)!r} to the student and {teacher_tokens.get(first)!r} to the teacher; "
            "use models that share a tokenizer"
        )
    if extra := sorted(student_tokens.keys() ^ teacher_tokens.keys()):
        first, owner = extra[0], "student" if extra[0] in student_tokens else "teacher"
        token = student_tokens.get(first, teacher_tokens.get(first))
        logger.warning(
            "%d token(s) are in one tokenizer only, first %r (id %d, the %s's): new to the other model",
            *(len(extra), token, first, owner),
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, role: str) -> None:
    """Refuse a model with fewer embedding rows than the tokenizer has ids; more rows are padding.

    Raises:
        VocabularyError: with `role` ("student" or "teacher") in the message.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise VocabularyError(
            f"the tokenizer's highest id is {highest}, but the {role} embeds ids 0 to {rows - 1} only: "
            "use that model's own tokenizer, or give the student a larger vocab_size"
        )
