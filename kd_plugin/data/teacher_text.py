"""What the teacher reads of each conversation, where that is another text, and which of its tokens are the answers.

Notable decisions:
- both texts are rendered, tokenised and marked in the same way, from the same turns. The answers have to be the same
  token ids in both, one for one: then the k-th trained token of one is that of the other, whatever stands around it;
- a conversation of which that is not so is left out, counted and named. Where a template ends its answers with another
  token than the student's, that is all of them, and the run ends.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_plugin.data.corpus import Document, TeacherText
from kd_plugin.data.encoding import conversation_document
from kd_plugin.data.record import DataError, Record
from kd_plugin.data.template_text import template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_plugin.settings.run import RunConfig
    from kd_plugin.settings.teacher_input import TeacherInputConfig

__all__ = ["TeacherReader", "teacher_reader_of"]

_OTHER_ANSWERS = "answer whose tokens are others as the teacher reads it (teacher.input)"
_NO_QUESTION = "answer with nothing before it as the teacher reads it (teacher.input)"
_SYSTEM = ("system", "developer")


class TeacherReader:
    """Renders conversations for the teacher.

    Args:
        config: the system prompt and the chat template of its own.
        tokenizer: the data's.

    Raises:
        DataError: the chat template cannot be read.
    """

    def __init__(self, config: TeacherInputConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._system, template = config.system, template_text(config)
        self._tokenizer = tokenizer
        if template is not None:
            self._tokenizer = copy.deepcopy(tokenizer)
            self._tokenizer.chat_template = template

    def __call__(self, record: Record, document: Document) -> Document | str:
        """`document`, which the student reads of `record`, with what the teacher reads; or why it is left out.

        Raises:
            DataError: a record that is no conversation, or that the template cannot render.
        """
        if record.form != "messages":
            raise DataError(
                f"{record.where}: teacher.input renders conversations, and this row is {record.form}: give "
                "conversations (messages, or prompt and completion as lists of turns), or remove teacher.input"
            )
        theirs = conversation_document(self._as_it_reads(record), self._tokenizer)
        assert theirs is not None  # there is an answer in the student's
        answers, others = (each.input_ids[each.trained] for each in (document, theirs))
        if not np.array_equal(answers, others):
            return _OTHER_ANSWERS
        places = np.flatnonzero(theirs.trained)
        if places[0] == 0:
            return _NO_QUESTION
        at = np.full(len(document.input_ids), -1, dtype=np.int64)
        at[document.trained] = places
        return document._replace(teacher=TeacherText(theirs.input_ids, at))

    def _as_it_reads(self, record: Record) -> Record:
        values: dict[str, Any] = dict(record.values)
        if self._system is not None:
            turns = values["messages"]
            own = int(bool(turns) and turns[0]["role"] in _SYSTEM)
            values["messages"] = [{"role": "system", "content": self._system}, *turns[own:]]
            values["untrained"] = {index + 1 - own for index in values["untrained"] if index >= own}
        return record._replace(values=values, where=f"{record.where} (as the teacher reads it)")


def teacher_reader_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TeacherReader | None:
    """What makes the teacher's text in a run; None where it reads the student's, or is not asked.

    Raises:
        DataError: its chat template cannot be read.
    """
    own = config.teacher.input
    return None if own is None or not config.distill.soft_weight else TeacherReader(own, tokenizer)
