"""What does not go with a teacher that reads another text, found before anything is loaded. Imports no torch."""

from __future__ import annotations

from kd_plugin.data.record import DataError
from kd_plugin.data.template_text import template_text
from kd_plugin.settings.run import RunConfig

__all__ = ["input_problems"]


def input_problems(config: RunConfig) -> list[str]:
    """One line for each setting that `teacher.input` excludes, and for a template that cannot be read."""
    own = config.teacher.input
    if own is None:
        return []
    problems = []
    if config.data.packing == "joined":
        problems.append(
            "teacher.input is set, and data.packing is joined, where both models read the same tokens in a row: set "
            "data.packing to isolated, or remove teacher.input"
        )
    if config.distill.soft_everywhere:
        problems.append(
            "teacher.input is set, and distill.soft_on is all, but of a prompt the teacher reads other tokens: set "
            "distill.soft_on to trained, or remove teacher.input"
        )
    try:
        template_text(own)
    except DataError as error:
        problems.append(str(error))
    return problems
