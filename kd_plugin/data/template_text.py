"""The text of a chat template that a setting names."""

from __future__ import annotations

from pathlib import Path

from kd_plugin.data.record import DataError
from kd_plugin.settings.teacher_input import TeacherInputConfig

__all__ = ["template_text"]


def template_text(config: TeacherInputConfig) -> str | None:
    """The teacher's chat template; None if it has none of its own.

    Raises:
        DataError: it names a file that cannot be read.
    """
    given = config.chat_template
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(
            f"teacher.input.chat_template: {given} cannot be read ({reason}); name a file, or write the template itself"
        ) from error
