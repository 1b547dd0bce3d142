"""The turns of a conversation: their roles, what they hold, and which of them are trained on.

Notable decisions:
- a turn with `weight: 0` (OpenAI), `train: false` (Axolotl: `training`), `loss: false` or `masked: true` is read and
  not trained on; weights between are refused;
- content in parts is joined where all of them are text, as templates do. A turn says something: one without content
  is refused unless it calls a tool, since templates print None as a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd_plugin.data.other_columns import LISTS, REFUSED_ANYWHERE, counts
from kd_plugin.data.record import DataError

__all__ = ["conversation", "says_nothing", "text_of"]

_WEIGHTS = ("weight", "train", "training", "loss", "loss_weight")
_MASKS = ("masked", "mask")
_PARTIAL_TURNS = ("train_detail", "training_detail")
_FOR_US = (*_WEIGHTS, *_MASKS, *_PARTIAL_TURNS)
"""Keys of a turn that no template sees."""
_TEXT_ROLES = ("system", "developer", "user", "assistant")
_ASSISTANTS = ("model", "chatgpt", "bot", "chatbot", "ai", "agent")
"""What other formats call the assistant."""
_OTHER_ROLES = ("tool", "function", "ipython", "environment", "observation", "tool_response", "document")
_SAYS_IT_OTHERWISE = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


def conversation(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What becomes of the `messages` of `row`, and of what goes to the chat template beside them.

    Raises:
        DataError: turns that are no conversation, that no assistant answers, or that cannot be heeded.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        raise DataError(f"{where}: 'messages' has to be a list of {{role, content}}, found {str(messages)[:60]!r}")
    _check_roles({str(turn["role"]) for turn in messages}, where)
    places = [f"{where}, turn {number}" for number in range(1, len(messages) + 1)]
    untrained = {index for index, turn in enumerate(messages) if not _is_trained(turn, places[index])}
    turns = [_turn(turn, place) for turn, place in zip(messages, places, strict=True)]
    return {"messages": turns, "untrained": untrained, **_for_template(row, where)}


def _check_roles(roles: set[str], where: str) -> None:
    """Refuse a conversation in which the assistant has another name, and would not be trained on."""
    if "assistant" not in roles and (strange := sorted(roles - {*_TEXT_ROLES, *_OTHER_ROLES})):
        raise DataError(
            f"{where}: no turn is of role 'assistant', whose turns are trained on; found {', '.join(strange)}: "
            "rename the roles user and assistant (human and gpt are read as these)"
        )
    if foreign := sorted(roles & {*_ASSISTANTS}):
        raise DataError(
            f"{where}: turns of role {', '.join(foreign)} would not be trained on, as those of role assistant are: "
            "give them one name, assistant"
        )


def _for_template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `row` gives the chat template beside the turns."""
    values: dict[str, Any] = {}
    for column in LISTS:
        if parsed := _parsed(row.get(column), column, where):
            values[column] = _list_of_objects(parsed, column, where)
    if settings := _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs", where):
        if not isinstance(settings, Mapping):
            raise DataError(f"{where}: 'chat_template_kwargs' has to be an object, found {str(settings)[:60]!r}")
        values["chat_template_kwargs"] = {key: value for key, value in settings.items() if value is not None}
    return values


def _is_trained(turn: Mapping[str, Any], place: str) -> bool:
    for key in _PARTIAL_TURNS:
        if turn.get(key):
            raise DataError(f"{place}: {key!r} trains on parts of a turn, which is not possible: remove it")
    given = {key: turn[key] for key in (*_WEIGHTS, *_MASKS) if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # True and False are among these
            raise DataError(f"{place}: {key!r} is {value!r}, wanted 0 or 1 (not trained on, or trained on)")
    return all(bool(value) != (key in _MASKS) for key, value in given.items())


def _turn(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What the template sees of a turn: a value that is null is left out."""
    for key in REFUSED_ANYWHERE:
        if counts(turn.get(key), "messages", key):
            raise DataError(f"{place}: {key!r} changes what a turn means and cannot be heeded: {REFUSED_ANYWHERE[key]}")
    kept = {key: value for key, value in turn.items() if value is not None and key not in _FOR_US}
    content = _content(turn.get("content"), str(turn["role"]), place)
    if content is None and not any(turn.get(key) for key in _SAYS_IT_OTHERWISE):
        raise DataError(f"{place}: has no 'content'; found {', '.join(map(str, kept))}: write '' for nothing")
    return {**kept, "content": content} if "content" in turn else kept


def _content(content: Any, role: str, place: str) -> Any:
    if content is None:
        return None
    if isinstance(content, str):
        return text_of(content, "content", place)
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, Mapping) and _is_text(part) for part in parts):
        return "".join(text_of(part["text"], "content", place) for part in parts)
    if role not in _TEXT_ROLES and not any(isinstance(part, Mapping) and "type" in part for part in parts):
        return content  # what a tool has returned, which templates print as JSON
    strange = next((part for part in parts if not (isinstance(part, Mapping) and _is_text(part))), content)
    kind = strange.get("type") if isinstance(strange, Mapping) else None
    what = f"a part of type {kind!r}" if kind else f"{type(strange).__name__} {str(strange)[:40]!r}"
    raise DataError(f"{place}: 'content' holds {what}, wanted text or a list of {{type: text, text: ...}}")


def _is_text(part: Mapping[str, Any]) -> bool:
    return part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _parsed(value: Any, column: str, where: str) -> Any:
    """`value`, parsed if it is JSON in a string, as tables with one type per column have it; None for nothing."""
    if not isinstance(value, str):
        return value or None
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: {column!r} is text and no JSON ({error})") from None


def _list_of_objects(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    items = [_parsed(item, column, where) for item in value] if isinstance(value, list) else [value]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"{where}: {column!r} has to be a list of objects, found {str(value)[:60]!r}")
    return [dict(item) for item in items]


def says_nothing(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has no content and calls no tool."""
    content = turn.get("content")
    empty = not content or (isinstance(content, str) and not content.strip())
    return empty and not any(turn.get(key) for key in _SAYS_IT_OTHERWISE)


def text_of(value: Any, column: str, where: str) -> str:
    """The text of a cell, '' for none.

    Raises:
        DataError: it is no text, or holds half of a character.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {column!r} is of type {type(value).__name__}, wanted text; "
            "conversations go in a column 'messages'"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode_escape").decode()
            raise DataError(
                f"{where}: {column!r} holds {half} at character {error.start}, half of a character: repair the text"
            ) from None
    return value
