"""What the columns of a row mean: the form of its record, what else changes its prompt, and what is refused.

Notable decisions:
- a column that changes what a model reads, or what is trained on, is rendered or refused by name with its place,
  and never dropped; null and empty values say nothing and are accepted, and so is every other column (`id`, ...);
- rows of other formats are rewritten into `messages` first (`data.dialects`);
- beside `messages`, `tools`, `documents` and `chat_template_kwargs` reach the chat template. A text that belongs in
  front of the conversation (`system`, ...) has to stand in a turn already;
- `prompt` and `completion` are read as they stand, so nothing else can be brought into them: the same columns are
  refused, and likewise `instruction`, `context` and their like unless the prompt holds them;
- plain text is whole, and only what a template would have had to render into it is refused. Whatever stands beside
  a column that `data.text_column` names is of no account;
- what the turns of a conversation mean is for `data.turns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_plugin.data.dialects import rewritten
from kd_plugin.data.other_columns import RENDERED, looked_at, refuse_other_columns
from kd_plugin.data.record import DataError, Form, Record, RowForm
from kd_plugin.data.turns import conversation, text_of

if TYPE_CHECKING:
    from kd_plugin.settings.run import DataConfig

__all__ = ["RowReader"]


_COLUMNS: dict[RowForm, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt + completion": ("prompt", "completion"),
    "instruction + output": ("instruction", "output"),
}
"""Columns that make up a row of a form, in the order in which the forms are looked for; `text` comes last."""
_OF_TURNS = ("role", "content")


class RowReader:
    """Makes records of rows, as `data.text_column`, `data.columns` and `data.train_on` say.

    Attributes:
        not_found: names in `data.columns` that no row has had so far.
    """

    def __init__(self, config: DataConfig) -> None:
        self.text_column, self.last_only = config.text_column, config.train_on == "last"
        names = {theirs: ours for ours, theirs in config.columns.items()}
        self._of_turns = {theirs: ours for theirs, ours in names.items() if ours in _OF_TURNS}
        self._of_rows = {theirs: ours for theirs, ours in names.items() if ours not in _OF_TURNS}
        self.not_found = set(names)

    def record(self, row: Mapping[str, Any], where: str, *, padded: bool = False) -> Record:
        """The record of one row.

        Args:
            row: column -> value.
            where: the row's place, for errors.
            padded: the source gives all structures the same keys (Arrow), so that a null means that there is none.

        Raises:
            DataError: columns or values that are no accepted form, or that would change it and cannot be heeded.
        """
        row = self._renamed(row, self._of_rows)
        row_form = _form_of(row, self.text_column, where)
        if padded:
            row = {column: _without_nulls(value) for column, value in row.items()}
        for column in _COLUMNS.get(row_form, ()) if self._of_turns else ():
            row = {**row, column: self._renamed_turns(row[column])}
        row = rewritten(row, row_form, where)
        form = "messages" if "messages" in row and row_form != "text" else row_form
        assert form == "messages" or form == "prompt + completion" or form == "text"  # what else is rewritten
        values = self._values(row, form, where)
        refuse_other_columns(row, form, values, self.text_column, where)
        return Record(form, values, where, row_form if row_form != form else None)

    def columns_to_read(self, names: Sequence[str], flat: Iterable[str], where: str) -> list[str]:
        """Those of the columns `names` that `record` looks at; a template may read any of `flat`, which hold no lists.

        Raises:
            DataError: the columns are no accepted form.
        """
        row_form = _form_of(self._renamed(dict.fromkeys(names), self._of_rows), self.text_column, where)
        if row_form == "text":
            wanted = _columns_of("text", self.text_column)
        else:
            rendered = {"instruction", "input", "output", "prompt", "completion", *_COLUMNS[row_form]}
            wanted = {*_columns_of("messages", self.text_column), *rendered, *flat}
            if row_form == "prompt + completion":
                wanted |= _columns_of(row_form, self.text_column)
        return [name for name in names if self._of_rows.get(name, name) in wanted]

    def check_all_found(self, name: str) -> None:
        """Refuse a name of `data.columns` that no row had, once all are read; `name` is the setting with the source.

        Raises:
            DataError: there is one.
        """
        if self.not_found:
            raise DataError(
                f"data.columns: {', '.join(sorted(self.not_found))}: in no row of {name}; columns and keys of turns "
                "are named as the data has them, {ours: theirs}"
            )

    def _renamed(self, row: Mapping[str, Any], names: dict[str, str]) -> Mapping[str, Any]:
        """`row` with our names; a column that had one of them already gives way to the one that is named."""
        here = names.keys() & row.keys()
        if not here:
            return row
        self.not_found -= here
        ours = {names[theirs]: row[theirs] for theirs in here}
        return {**{key: value for key, value in row.items() if key not in here}, **ours}

    def _renamed_turns(self, turns: Any) -> Any:
        if not isinstance(turns, list):
            return turns
        return [self._renamed(turn, self._of_turns) if isinstance(turn, Mapping) else turn for turn in turns]

    def _values(self, row: Mapping[str, Any], form: Form, where: str) -> dict[str, Any]:
        if form != "messages":
            return {
                "text" if form == "text" else column: text_of(row[column], column, where)
                for column in _wanted(form, self.text_column)
            }
        values = conversation(row, where)
        if self.last_only:
            answers = [index for index, turn in enumerate(values["messages"]) if turn["role"] == "assistant"]
            values["untrained"] |= set(answers[:-1])
        read = _columns_of(form, self.text_column)
        values["unread"] = [column for column, value in row.items() if column not in read and value is not None]
        return values


def _form_of(names: Iterable[str], text_column: str, where: str) -> RowForm:
    """The form that the columns `names` make up; a text column named by the user goes first."""
    have = set(names)
    order: list[RowForm] = [*_COLUMNS, "text"]
    if text_column != "text":
        order.insert(0, "text")
    for form in order:
        if have.issuperset(_wanted(form, text_column)):
            return form
    raise DataError(
        f"{where}: columns found: {', '.join(sorted(have)) or 'none'}; wanted {text_column!r}, 'prompt' and "
        "'completion', 'messages', 'conversations', or 'instruction' and 'output'; data.columns names columns that "
        "are called otherwise, data.text_column one with plain text"
    )


def _columns_of(form: Form, text_column: str) -> set[str]:
    """Names of the columns that are looked at in a row of this form."""
    also = looked_at(form, text_column)
    rendered = RENDERED if form == "messages" else ()
    return {*_wanted(form, text_column), *also.refused, *also.texts, *also.flags, *rendered}


def _wanted(form: RowForm, text_column: str) -> tuple[str, ...]:
    return (text_column,) if form == "text" else _COLUMNS[form]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
