"""A conversation as the text that its chat template makes of it, and where in it the assistant speaks.

Notable decisions:
- what is trained on is what the template itself marks ({% generation %}), or else what rendering the conversation
  turn by turn adds;
- what a row gives the template has to reach the text: `tools`, `documents` and whole turns that change nothing in it,
  and settings or kinds of content that the template does not name, are refused, since both models would read another
  prompt than the data means; other keys of a turn that it does not name (`name`) are said once.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kd_plugin.data.chat_template import ChatTemplate, Spans
from kd_plugin.data.record import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Spans", "render"]

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

_IN_TURNS = {
    "tool_calls": ("tool_calls",),
    "function_call": ("function_call",),
    # One of the three is enough: the library hands each on under the other names.
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), ("reasoning_content", "thinking", "reasoning")),
}
"""Key of a turn that the model reads -> names of which the template has to know one."""
_BY_CHANCE = 12  # characters
_looked_at: set[tuple[str, str]] = set()
"""Template and key of turns, where it is known already whether the key reaches the text."""


def render(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    """The text of a record of form `messages`, and the spans that are trained on.

    Raises:
        DataError: no chat template, one that cannot render the conversation or drops a part of it, or one that renders
            a turn differently within the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{record.where}: 'messages' need a chat template, which this tokenizer lacks; use an instruct model's"
        )
    template, messages = ChatTemplate(record, tokenizer), record.values["messages"]
    _check_settings(template, record)
    _check_columns(template, record)
    _check_turns(template, messages)
    text, spans = _text_and_spans(template, messages, record.values["untrained"])
    _check_given(template, messages, text)
    _check_whole(template, messages, text)
    _check_keys(template, messages, text)
    return text, spans


def _text_and_spans(template: ChatTemplate, messages: Messages, untrained: set[int]) -> tuple[str, Spans]:
    answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not template.marks_answers:
        text = template.render(messages)
        turns = (index for index in answers if index > 0)  # an opening line answers nothing
        return text, [_span(template, messages, index, text) for index in turns if index not in untrained]
    text, spans = template.render_marked(messages)
    left_out = [_span(template, messages, index, text) for index in answers if index in untrained]
    return text, [
        (start, stop) for start, stop in spans if not any(start < last and first < stop for first, last in left_out)
    ]


def _span(template: ChatTemplate, messages: Messages, index: int, whole: str) -> tuple[int, int]:
    """Where turn `index` lies in `whole`, the text of all `messages`; what asks for the turn is no part of it."""
    before = template.render(messages[:index], asks=True) if index else ""
    after = template.render(messages[: index + 1])
    if not (after.startswith(before) and whole.startswith(after)):
        raise DataError(
            f"{template.where}: the chat template renders turn {index + 1} differently within the conversation, "
            "so its tokens cannot be told; use a template with {% generation %} marks, or one answer "
            "per conversation"
        )
    return len(before), len(after)


def _check_given(template: ChatTemplate, messages: Messages, text: str) -> None:
    for name in ("tools", "documents"):
        if name in template.given and template.render_or_none(messages, without=name) == text:
            raise DataError(
                f"{template.where}: the chat template drops {name!r}: use a tokenizer whose template renders them, "
                "or leave such rows out"
            )


def _check_whole(template: ChatTemplate, messages: Messages, text: str) -> None:
    """Refuse a template that drops a turn: rendering without it gives the same text.

    A turn whose content follows those before it in `text` needs no such rendering; a short one may stand anywhere by
    chance.
    """
    reached = 0
    for index, turn in enumerate(messages):
        content = turn.get("content")
        content = content.strip() if isinstance(content, str) else ""
        place = text.find(content, reached)
        if len(content) > _BY_CHANCE and place >= 0:
            reached = place + len(content)
            continue
        says_something = content or any(value for key, value in turn.items() if key != "role")
        if says_something and template.render_or_none(messages[:index] + messages[index + 1 :]) == text:
            raise DataError(
                f"{template.where}, turn {index + 1}: the chat template drops the whole turn, of role "
                f"{turn['role']!r}: use a tokenizer whose template renders it, or leave such rows out"
            )


def _check_keys(template: ChatTemplate, messages: Messages, text: str) -> None:
    """Say, once for each template and key of turns, that the key does not reach the text."""
    for number, key in _unseen_keys(template, messages):
        others = [{name: value for name, value in turn.items() if name != key} for turn in messages]
        if template.render_or_none(others) == text:
            logger.warning(
                "%s, turn %d: the chat template does not render %r, so the models do not read it; said once "
                "for all turns that have it",
                *(template.where, number, key),
            )


def _unseen_keys(template: ChatTemplate, messages: Messages) -> Iterator[tuple[int, str]]:
    """Number of a turn, and a key of it that was not looked for in this template's texts yet."""
    for number, turn in enumerate(messages, 1):
        for key in turn.keys() - _IN_TURNS.keys() - {"role", "content"}:
            if turn[key] and (template.source, key) not in _looked_at:
                _looked_at.add((template.source, key))
                yield number, key


def _check_settings(template: ChatTemplate, record: Record) -> None:
    settings = record.values.get("chat_template_kwargs", {})
    taken = inspect.signature(template.tokenizer.apply_chat_template).parameters if settings else {}
    for name, value in settings.items():
        if name in taken or name == "messages":
            raise DataError(f"{record.where}: chat_template_kwargs.{name} is no setting of a template: remove it")
        # True, too, may be a template's own default, so a text that stays the same says nothing.
        if not template.knows(name) and value not in ("", [], {}):
            raise DataError(
                f"{record.where}: the chat template knows no {name!r}, which chat_template_kwargs sets: use a "
                "tokenizer whose template has it, or remove it"
            )


def _check_columns(template: ChatTemplate, record: Record) -> None:
    for name in sorted(template.variables.intersection(record.values.get("unread", ()))):
        raise DataError(
            f"{record.where}: the chat template reads {name!r}, which the column of that name does not reach: write "
            "it into 'chat_template_kwargs', or remove the column"
        )


def _check_turns(template: ChatTemplate, messages: Messages) -> None:
    for number, turn in enumerate(messages, 1):
        for key, names in _IN_TURNS.items():
            if turn.get(key) and not any(map(template.knows, names)):
                raise DataError(
                    f"{template.where}, turn {number}: the chat template knows no {key!r} and would drop it: use a "
                    "tokenizer whose template renders it, or leave such rows out"
                )
