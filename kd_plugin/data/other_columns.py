"""Columns beside those that make up a row: such as would change what it means, and cannot be heeded, are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kd_plugin.data.record import DataError, Form

LISTS = ("tools", "documents")
RENDERED = (*LISTS, "chat_template_kwargs")
_AS_TOOLS = "rename it 'tools', a list of {type: function, function: ...}"
_NO_MEDIA = "the models read text only: leave such rows out"
_NO_MASK = "what is trained on follows from the form of the row: remove the column if that is meant"
_BY_TEMPLATE = "it reaches a model through a chat template: give 'messages', or remove it if the text has it already"
_FUNCTIONS = dict.fromkeys(("functions", "available_tools", "tool_definitions"), _AS_TOOLS)
REFUSED_ANYWHERE = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _NO_MEDIA),
    **dict.fromkeys(("assistant_masks", "completion_mask", "labels", "loss_mask"), _NO_MASK),
    **dict.fromkeys(("chat_template", "enable_thinking"), "give it to the template: 'chat_template_kwargs'"),
    **dict.fromkeys(("tool_choice", "suffix"), "write it into the text, as the model is to read it"),
    "response_format": "write it into the system turn, as the model is to read it",
    "history": "write earlier turns into 'messages'",
    "refusal": "write it as the turn's 'content'",
}
_REFUSED: dict[Form, dict[str, str]] = {
    "messages": {**_FUNCTIONS, **REFUSED_ANYWHERE},
    "prompt + completion": {**_FUNCTIONS, **REFUSED_ANYWHERE, **dict.fromkeys(RENDERED, _BY_TEMPLATE)},
    "text": {**_FUNCTIONS, **dict.fromkeys(RENDERED, _BY_TEMPLATE)},
}
"""Columns that would change prompt or mask and cannot be heeded -> what to do."""
_IN_FRONT = ("system", "system_prompt", "system_message", "developer", "instructions", "context")
_TEXTS: dict[Form, tuple[str, ...]] = {
    "messages": _IN_FRONT,
    "prompt + completion": (*_IN_FRONT, "instruction", "input", "passage", "document"),
    "text": (),
}
"""Columns whose text a prompt should hold."""


class _Looked(NamedTuple):
    """The other columns that matter for a row."""

    refused: dict[str, str]
    """Columns that are refused by name -> what to do."""
    texts: tuple[str, ...]
    """Columns whose text the prompt should hold."""
    flags: tuple[str, ...]
    """Columns that weigh or judge the row."""


def looked_at(form: Form, text_column: str) -> _Looked:
    """The other columns that matter for a row of this form."""
    if form == "text":
        return _Looked(_REFUSED[form] if text_column == "text" else {}, (), ())
    return _Looked(_REFUSED[form], _TEXTS[form], ("weight", "label"))


def refuse_other_columns(
    row: Mapping[str, Any], form: Form, values: dict[str, Any], text_column: str, where: str
) -> None:
    """Refuse columns of `row`, beside those that became `values`, that cannot be heeded.

    Raises:
        DataError: one of them changes what the row means, or marks it as one to leave out.
    """
    looked = looked_at(form, text_column)
    for column, cure in looked.refused.items():
        if counts(row.get(column), form, column):
            raise DataError(f"{where}: {column!r} changes what a row means and cannot be heeded: {cure}")
    before = values["prompt"] if form == "prompt + completion" else _spoken(values)
    for column in looked.texts:
        text = row.get(column)
        if isinstance(text, str) and text.strip() not in before:
            home = "the first turn of 'messages'" if form == "messages" else "'prompt'"
            raise DataError(f"{where}: the text of {column!r} is not in the prompt: write it into {home}")
    if "weight" in looked.flags and row.get("weight") not in (None, 1):
        raise DataError(f"{where}: 'weight' is {row['weight']!r}, and all rows weigh the same: remove the column")
    if "label" in looked.flags and row.get("label") is False:
        raise DataError(f"{where}: 'label' is false, which marks an undesired answer: leave such rows out")


def counts(value: Any, form: Form, column: str) -> bool:
    """Whether the `value` of a column says something.

    Beside plain text only what templates are given does (lists, objects, JSON), and no word or number.
    """
    if form == "text":
        first = value[0] if isinstance(value, list | str) and value else value
        return first in ("[", "{") if isinstance(value, str) else isinstance(first, Mapping) and bool(first)
    if column == "labels":
        return isinstance(value, list) and bool(value)
    if column == "enable_thinking":  # which templates take for true unless it is false
        return value is not None
    return bool(value.strip() if isinstance(value, str) else value)


def _spoken(values: dict[str, Any]) -> str:
    return "\n".join(str(turn.get("content")) for turn in values.get("messages", ()))
