"""A tokenizer's chat template with what one record gives it: rendering, and the names that it knows."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from kd_plugin.data.record import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Spans"]

Spans = list[tuple[int, int]]
"""Spans of a text: from which character to which, end excluded."""

_GENERATION_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class ChatTemplate:
    """The chat template that renders one record.

    Attributes:
        source: its text.
        given: `tools`, `documents` and the template's own settings, as keyword arguments of the renderer.

    Raises:
        DataError: the tokenizer has no chat template for this record; so do the methods where the template refuses it.
    """

    def __init__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.where = tokenizer, record.where
        settings = record.values.get("chat_template_kwargs", {})
        self.given = {key: record.values[key] for key in ("tools", "documents") if key in record.values} | settings
        with self._one_line():
            self.source = tokenizer.get_chat_template(tools=self.given.get("tools"))
        self._in_parts = _wants_parts(self.source)

    def render(self, messages: list[dict[str, Any]], *, asks: bool = False) -> str:
        """The text of `messages`, with `asks` followed by what asks the assistant for an answer."""
        with self._one_line():
            return self._text_of(messages, self.given, asks=asks)

    def render_or_none(self, messages: list[dict[str, Any]], *, without: str = "") -> str | None:
        """The text of `messages` without the `given` of that name; None where the template cannot do without it."""
        others = {key: value for key, value in self.given.items() if key != without}
        try:
            return self._text_of(messages, others)
        except Exception:  # whatever a template raises
            return None

    def render_marked(self, messages: list[dict[str, Any]]) -> tuple[str, Spans]:
        """The text of `messages`, and the spans that {% generation %} marks in it."""
        # `apply_chat_template(return_assistant_tokens_mask=True)` marks the whole rest of a conversation when
        # a span ends in a character without a token (transformers 5.23), so only its renderer is used.
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._one_line():
            texts, marked = render_jinja_template(
                conversations=[self._as_wanted(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.given},
            )
        return texts[0], cast("list[Spans]", marked)[0]  # the library says pairs of texts

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks what the assistant says ({% generation %})."""
        return _GENERATION_MARK.search(self.source) is not None

    @property
    def variables(self) -> frozenset[str]:
        """The names that the template reads from outside; none of a template that jinja2 cannot read."""
        return _variables(self.source)

    def knows(self, name: str) -> bool:
        """Whether the template's text holds `name` as a word."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _text_of(self, messages: list[dict[str, Any]], given: dict[str, Any], *, asks: bool = False) -> str:
        asking: dict[str, Any] = {"add_generation_prompt": True} if asks else {}
        messages = self._as_wanted(messages)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **given, **asking)
        assert isinstance(text, str)  # of one conversation, not tokenized
        return text

    def _as_wanted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` with each text as a list of one part, if the template reads nothing else."""
        if not self._in_parts:
            return messages
        return [
            {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn
            for turn in messages
            for content in [turn.get("content")]
        ]

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn whatever the template raises (a program, perhaps made for other data) into one line with its place."""
        from jinja2 import TemplateError  # comes with chat templates

        try:
            yield
        except Exception as error:
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where}: the chat template refuses the conversation: {kind}{reason}") from error


_PROBE = "kd_plugin probe"


@functools.lru_cache(maxsize=64)
def _wants_parts(template: str) -> bool:
    """Whether a text reaches what the template renders as a part ({type: text, text: ...}) only, and not as it is."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def reaches(content: Any) -> bool:
        turns = [{"role": "user", "content": content}]
        try:
            return _PROBE in render_jinja_template(conversations=[turns], chat_template=template)[0][0]
        except Exception:  # whatever a template raises
            return False

    return not reaches(_PROBE) and reaches([{"type": "text", "text": _PROBE}])


@functools.lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    import jinja2
    from jinja2 import meta

    plain = _GENERATION_MARK.sub("", template)  # a tag of Transformers' own
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree))
