"""Rows of other formats, rewritten into `messages`: ShareGPT, Alpaca, and prompts and completions made of turns.

Notable decisions:
- `conversations` are turns {from, value} or {role, content}; the roles `human` and `gpt` are user and assistant, here
  and in `messages`;
- `instruction`, with `input` below it after an empty line, is the user's turn, and `output` the assistant's: they are
  rendered with the tokenizer's own chat template and not with a wording of this package;
- a column `system` beside one of these two is the system turn, as their other readers have it;
- of a prompt with completion made of turns only the completion's are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_plugin.data.record import DataError, RowForm

__all__ = ["rewritten"]

_ROLES = {"human": "user", "gpt": "assistant"}
_SHARE_GPT = {"from": "role", "value": "content"}


def rewritten(row: Mapping[str, Any], form: RowForm, where: str) -> Mapping[str, Any]:
    """`row` with `messages` in place of the columns of its form; itself where it has them, or is text.

    Raises:
        DataError: a column of the form holds something else than the form wants.
    """
    if form == "conversations":
        return _with_messages(row, _turns(row["conversations"], "conversations", where), ("conversations",), where)
    if form == "instruction + output":
        turns = [
            {"role": "user", "content": _instruction(row, where)},
            {"role": "assistant", "content": _cell(row, "output", where)},
        ]
        return _with_messages(row, turns, ("instruction", "input", "output"), where)
    if form == "prompt + completion" and any(isinstance(row[name], list) for name in ("prompt", "completion")):
        return _of_turns(row, where)
    if form == "messages" and isinstance(row["messages"], list):
        return {**row, "messages": _turns(row["messages"], "messages", where)}
    return row


def _turns(turns: Any, column: str, where: str) -> list[Any]:
    wanted = "{from, value} or {role, content}" if column == "conversations" else "{role, content}"
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: {column!r} has to be a list of {wanted}, found {str(turns)[:60]!r}")
    known = [_known_turn(turn) for turn in turns]
    for number, turn in enumerate(known, 1):
        if turn.get("role") is None:
            raise DataError(f"{where}, turn {number}: wanted {wanted}, found {str(dict(turns[number - 1]))[:60]!r}")
    return known


def _known_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The turn with our names for its keys and its role."""
    if "role" not in turn and "from" in turn:
        turn = {_SHARE_GPT.get(key, key): value for key, value in turn.items()}
    role = turn.get("role")
    return {**turn, "role": _ROLES.get(role, role) if isinstance(role, str) else role}


def _with_messages(
    row: Mapping[str, Any], turns: list[Any], instead_of: tuple[str, ...], where: str
) -> Mapping[str, Any]:
    others = {key: value for key, value in row.items() if key not in (*instead_of, "messages")}
    if others.get("system") and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": _cell(others, "system", where)}, *turns]
    return {**others, "messages": turns}


def _instruction(row: Mapping[str, Any], where: str) -> str:
    parts = [_cell(row, name, where) for name in ("instruction", "input")]
    return "\n\n".join(part for part in parts if part.strip())


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is of type {type(value).__name__}, wanted text")
    return value or ""


def _of_turns(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if not isinstance(row[name], list):
            raise DataError(f"{where}: {other!r} is a list of turns and {name!r} is not: make both the same")
    prompt, completion = (_turns(row[name], name, where) for name in ("prompt", "completion"))
    turns = [*({**turn, "train": False} for turn in prompt), *completion]
    return {**{key: value for key, value in row.items() if key not in ("prompt", "completion")}, "messages": turns}
