"""Whether token ids mean the same thing on both sides, and whether both sides know them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TokenizerMismatch", "TokenizerPair", "check_tokenizers", "check_vocabulary"]

TokenizerPair: TypeAlias = "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]"
"""The student's and the teacher's."""

logger = logging.getLogger(__name__)


class TokenizerMismatch(ValueError):
    """An id means one token to the student and another to the teacher."""


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give one id different meanings; ids that only one of them has are reported.

    Raises:
        TokenizerMismatch: naming how many ids differ, and the first.
    """
    for side, tokenizer in (("student", student), ("teacher", teacher)):
        if not hasattr(tokenizer, "get_vocab"):
            raise TokenizerMismatch(
                f"the {side}'s tokenizer is a {type(tokenizer).__name__}; wanted a loaded one, such as "
                "transformers.AutoTokenizer.from_pretrained(...)"
            )
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    student_tokens = {index: token for token, index in student_ids.items()}
    teacher_tokens = {index: token for token, index in teacher_ids.items()}
    if different := _different_ids(student_ids, teacher_ids, student_tokens, teacher_tokens):
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


def _different_ids(
    student_ids: dict[str, int],
    teacher_ids: dict[str, int],
    student_tokens: dict[int, str],
    teacher_tokens: dict[int, str],
) -> set[int]:
    """Ids that both sides know by different tokens."""
    both = student_tokens.keys() & teacher_tokens.keys()
    different = {index for index in both if student_tokens[index] != teacher_tokens[index]}
    # A token that moved to another id differs even where its old id is unused on the other side.
    for token in student_ids.keys() & teacher_ids.keys():
        if student_ids[token] != teacher_ids[token]:
            different.add(min(student_ids[token], teacher_ids[token]))
    return different


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, role: str) -> int:
    """The number of ids that `model` embeds, all from 0. Fewer than the tokenizer has is a warning here, since the
    rest may never occur: `check_ids` looks at the ids that do. Ids beyond the tokenizer's are padding.
    """
    size = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    lacking = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= size)
    if lacking:
        index, token = lacking[0]
        logger.warning(
            "%d token(s) of the tokenizer, first %r (id %d), are not embedded by the %s, which has %d ids: text that "
            "holds one is refused",
            *(len(lacking), token, index, role, size),
        )
    return size
