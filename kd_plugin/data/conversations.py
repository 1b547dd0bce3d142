"""A conversation as the text that its chat template makes of it, and where in it the assistant speaks.

Notable decisions:
- what is trained on is what the template itself marks ({% generation %}), or else what rendering the conversation
  turn by turn adds;
- what a row gives the template has to reach the text: `tools`, `documents` and whole turns that change nothing in it,
  and settings or kinds of content that the template does not name, are refused, since both models would read another
  prompt than the data means; other keys of a turn that it does not name (`name`) are said once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from kd_plugin.data.record import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Spans", "render"]

Spans = list[tuple[int, int]]
"""From which character to which, end excluded."""

logger = logging.getLogger(__name__)

_GENERATION_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_IN_TURNS = {
    "tool_calls": ("tool_calls",),
    "function_call": ("function_call",),
    # One of the three is enough: the library hands each on under the other names.
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), ("reasoning_content", "thinking", "reasoning")),
}
"""Key of a turn that the model reads -> names of which the template has to know one."""
_BY_CHANCE = 12  # characters
_looked_at: set[tuple[str, str]] = set()
"""Templates, and keys of turns of which it has been looked whether they reach the text."""


@functools.lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    """The names that a chat template reads from outside; none of a template that jinja2 cannot read."""
    import jinja2
    from jinja2 import meta

    plain = _GENERATION_MARK.sub("", template)  # a tag of Transformers' own
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree))


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
    return _Conversation(record, tokenizer).rendered()


class _Conversation:
    """One record with its template.

    Attributes:
        given: `tools`, `documents` and the template's own settings, as keyword arguments of the renderer.
    """

    def __init__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.where = tokenizer, record.where
        self.messages: list[dict[str, Any]] = record.values["messages"]
        self.untrained: set[int] = record.values["untrained"]
        settings = record.values.get("chat_template_kwargs", {})
        self.given = {key: record.values[key] for key in ("tools", "documents") if key in record.values} | settings
        with self._one_line():
            self.template = tokenizer.get_chat_template(tools=self.given.get("tools"))
        self._check_settings(settings)
        self._check_columns(record.values.get("unread", ()))
        self._check_turns()

    def rendered(self) -> tuple[str, Spans]:
        if _GENERATION_MARK.search(self.template):
            text, spans = self._marked_by_template()
        else:
            text = self._render(self.messages)
            turns = (index for index in self._answers() if index > 0)  # an opening line answers nothing
            spans = [self._turn(index, text) for index in turns if index not in self.untrained]
        self._check_given(text)
        self._check_whole(text)
        self._check_keys(text)
        return text, spans

    def _answers(self) -> Iterator[int]:
        return (index for index, turn in enumerate(self.messages) if turn["role"] == "assistant")

    def _marked_by_template(self) -> tuple[str, Spans]:
        # `apply_chat_template(return_assistant_tokens_mask=True)` marks the whole rest of a conversation when
        # a span ends in a character without a token (transformers 5.23), so only its renderer is used.
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._one_line():
            texts, found = render_jinja_template(
                conversations=[self.messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.given},
            )
        spans = cast("list[Spans]", found)  # the library says pairs of texts
        untrained = [self._turn(index, texts[0]) for index in self._answers() if index in self.untrained]
        return texts[0], [
            (start, stop)
            for start, stop in spans[0]
            if not any(start < last and first < stop for first, last in untrained)
        ]

    def _turn(self, index: int, whole: str) -> tuple[int, int]:
        """Where in `whole` turn `index` lies, without what asks for it."""
        before = self._render(self.messages[:index], add_generation_prompt=True) if index else ""
        after = self._render(self.messages[: index + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{self.where}: the chat template renders turn {index + 1} differently within the conversation, "
                "so its tokens cannot be told; use a template with {% generation %} marks, or one answer "
                "per conversation"
            )
        return len(before), len(after)

    def _render(self, messages: list[dict[str, Any]], **other: Any) -> str:
        with self._one_line():
            return self._text_of(messages, **self.given, **other)

    def _text_of(self, messages: list[dict[str, Any]], **given: Any) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **given)
        assert isinstance(text, str)  # of one conversation, not tokenized
        return text

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Whatever a template raises (it is a program, and may not have been made for this data), with its place."""
        from jinja2 import TemplateError  # comes with chat templates

        try:
            yield
        except Exception as error:
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where}: the chat template refuses the conversation: {kind}{reason}") from error

    def _check_given(self, text: str) -> None:
        for name in ("tools", "documents"):
            if name in self.given and self._or_none(self.messages, without=name) == text:
                raise DataError(
                    f"{self.where}: the chat template drops {name!r}: use a tokenizer whose template renders them, "
                    "or leave such rows out"
                )

    def _check_whole(self, text: str) -> None:
        """No turn is dropped. Rendered without it, too, is one whose content does not follow those before it in `text`.

        A short one may stand anywhere by chance.
        """
        reached = 0
        for index, turn in enumerate(self.messages):
            content = turn.get("content")
            content = content.strip() if isinstance(content, str) else ""
            found = text.find(content, reached)
            if len(content) > _BY_CHANCE and found >= 0:
                reached = found + len(content)
                continue
            says_something = content or any(value for key, value in turn.items() if key != "role")
            if says_something and self._or_none(self.messages[:index] + self.messages[index + 1 :]) == text:
                raise DataError(
                    f"{self.where}, turn {index + 1}: the chat template drops the whole turn, of role "
                    f"{turn['role']!r}: use a tokenizer whose template renders it, or leave such rows out"
                )

    def _check_keys(self, text: str) -> None:
        """Say, once for each template and key of turns, that it does not reach the text."""
        for number, turn in enumerate(self.messages, 1):
            for key in turn.keys() - _IN_TURNS.keys() - {"role", "content"}:
                if not turn[key] or (self.template, key) in _looked_at:
                    continue
                _looked_at.add((self.template, key))
                others = [{name: value for name, value in other.items() if name != key} for other in self.messages]
                if self._or_none(others) == text:
                    logger.warning(
                        "%s, turn %d: the chat template does not render %r, so the models do not read it; said once "
                        "for all turns that have it",
                        *(self.where, number, key),
                    )

    def _or_none(self, messages: list[dict[str, Any]], *, without: str = "") -> str | None:
        """Their text, without one of the other things given; None if the template cannot do without what is left out,
        which then reaches the text."""
        others = {key: value for key, value in self.given.items() if key != without}
        try:
            return self._text_of(messages, **others)
        except Exception:  # whatever a template raises
            return None

    def _check_settings(self, settings: dict[str, Any]) -> None:
        taken = inspect.signature(self.tokenizer.apply_chat_template).parameters if settings else {}
        for name, value in settings.items():
            if name in taken or name == "messages":
                raise DataError(f"{self.where}: chat_template_kwargs.{name} is no setting of a template: remove it")
            # True, too, may be a template's own default, so a text that stays the same says nothing.
            if not self._knows(name) and value not in ("", [], {}):
                raise DataError(
                    f"{self.where}: the chat template knows no {name!r}, which chat_template_kwargs sets: use a "
                    "tokenizer whose template has it, or remove it"
                )

    def _check_columns(self, unread: Iterable[str]) -> None:
        for name in sorted(_variables(self.template).intersection(unread)):
            raise DataError(
                f"{self.where}: the chat template reads {name!r}, which the column of that name does not reach: write "
                "it into 'chat_template_kwargs', or remove the column"
            )

    def _check_turns(self) -> None:
        for number, turn in enumerate(self.messages, 1):
            for key, names in _IN_TURNS.items():
                if turn.get(key) and not any(map(self._knows, names)):
                    raise DataError(
                        f"{self.where}, turn {number}: the chat template knows no {key!r} and would drop it: use a "
                        "tokenizer whose template renders it, or leave such rows out"
                    )

    def _knows(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.template) is not None
