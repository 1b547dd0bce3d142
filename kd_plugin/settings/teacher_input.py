# pyright: strict
"""The teacher's text of a conversation, where that is another than the student's; nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.functional_validators import model_validator

from kd_plugin.settings.distill import Section

__all__ = ["TeacherInputConfig"]


class TeacherInputConfig(Section):
    """What the teacher reads of a conversation, where that is not what the student reads."""

    system: Annotated[str, Field(min_length=1)] | None = None
    """System prompt that only the teacher reads; it takes the place of the conversation's own."""

    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Chat template by which only the teacher's text is rendered: a file, or the template itself (with `{`)."""

    @model_validator(mode="after")
    def _something(self) -> TeacherInputConfig:
        if self.system is None and self.chat_template is None:
            raise ValueError("teacher.input says nothing: set system or chat_template, or remove it")
        return self
