"""One document before it is tokenised, and the error about one that cannot be read."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Form = Literal["text", "prompt + completion", "messages"]
RowForm = Literal[Form, "conversations", "instruction + output"]
"""Form of a row in the data; the last two are rewritten into `messages`."""


class DataError(ValueError):
    """Data that is missing, unreadable, or not in an accepted form."""


class Record(NamedTuple):
    """One document before tokenisation."""

    form: Form
    values: dict[str, Any]
    """`text: str`, or `prompt: str` and `completion: str`, or `messages: list[dict]` with `untrained: set[int]` (turns
    that are not trained on), `unread: list[str]` (columns that mean nothing to anybody but perhaps to a template) and,
    where given, `tools`, `documents` (lists of dicts) and `chat_template_kwargs`."""

    where: str
    """The place that it comes from, for error messages."""

    row_form: RowForm | None = None
    """The form of its row, where that is another."""
