"""A JSON list in pieces: the items that the json module finds in the whole text, whatever the size of a piece."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data import json_list
from kd_plugin.data.json_list import JsonList
from tests.refusals import refused


def read(content: bytes) -> list[tuple[int, Any]]:
    made = JsonList(io.BytesIO(content), Path("x.json"))
    assert made.is_list()
    return list(made.items())


def rows(number: int) -> list[Any]:
    draw = random.Random(0)
    letters = 'abc"\\\n\té\u4e2d\U0001f600 []{},:'
    return [
        {"text": "".join(draw.choices(letters, k=draw.randint(0, 60))), "n": [draw.random() * 10**6, None, True, -3]}
        for _ in range(number)
    ]


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 10**6])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_items_are_those_of_the_whole_text(
    monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None, ascii_only: bool
) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    wanted = [*rows(40), 1234567, 12.5, "a", False, None, []]
    text = "\ufeff \n" + json.dumps(wanted, indent=indent, ensure_ascii=ascii_only) + "\n\n"
    assert [item for _, item in read(text.encode())] == wanted


@pytest.mark.parametrize("piece", [1, 64, 10**6])
def test_the_lines_are_those_in_which_items_begin(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    assert read(b'[{"a":\n1}\n,\n\n {"b": 2}, 3,\n4]') == [(1, {"a": 1}), (5, {"b": 2}), (5, 3), (6, 4)]


@pytest.mark.parametrize("piece", [1, 3, 10**6])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n {"a" 2}, {"a": 3}]', "x.json:2: not a list of JSON objects (Expecting ':' delimiter)"),
        (b'[{"a": 1},\n {"a": tru}, {"a": 3}]', "x.json:2: not a list of JSON objects (Expecting value)"),
        (b'[{"a": "b', "x.json:1: not a list of JSON objects (Unterminated string starting at"),
        (b"[1,\n2\n3]", "x.json:3: not a list of JSON objects (no ',' or ']' after an item)"),
        (b"[1,\n2\n", "x.json:3: not a list of JSON objects (no ',' or ']' after an item)"),
        (b"[1]\n\n3", "x.json:1: something follows the end of the JSON list"),
        ('[\n"\u4e2d"]'.encode()[:-3], "x.json: not UTF-8 text (byte 3)"),
        ('["\u4e2d\u4e2d'.encode() + b'\xff"]', "x.json: not UTF-8 text (byte 8)"),
    ],
)
def test_faults_have_their_line_whatever_the_pieces(
    monkeypatch: pytest.MonkeyPatch, piece: int, content: bytes, said: str
) -> None:
    monkeypatch.setattr(json_list, "_PIECE", piece)
    refused(lambda: read(content), said)


def test_a_fault_is_found_without_reading_to_the_end() -> None:
    content = io.BytesIO(b'[{"a" 1}, ' + b'{"a": 1}, ' * 10**6 + b"2]")
    made = JsonList(content, Path("x.json"))
    assert made.is_list()
    refused(lambda: list(made.items()), "x.json:1: not a list of JSON objects")
    assert content.tell() == json_list._PIECE


def test_items_are_let_go_of() -> None:
    made = JsonList(io.BytesIO(b"[" + b'{"a": 1}, ' * 10**6 + b"2]"), Path("x.json"))
    assert made.is_list()
    assert sum(1 for _ in made.items()) == 10**6 + 1
    assert len(made._text) <= 2 * json_list._PIECE
