"""A JSON list that is read piece by piece, so that one item is held and not all of them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kd_plugin.data.record import DataError

__all__ = ["JsonList", "not_utf8"]

_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_DECODER = json.JSONDecoder()
_PIECE = 2**20  # bytes that are read at once
_NEAR_THE_END = 16  # characters; no escape, number or word of JSON that is cut off is found wrong before


class JsonList:
    """A list of items in `file`, of which a window is held: from the item that is read now to what was read of it.

    Args:
        file: UTF-8 text, from its beginning.
        path: its name, for errors.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0  # the line of the character `_counted`
        self._num_bytes, self._is_whole = 0, False

    def is_list(self) -> bool:
        """Whether the text begins as a list."""
        return self._next() == "["

    def items(self) -> Iterator[tuple[int, Any]]:
        """The items, each with the line that it begins in.

        Raises:
            DataError: what is there is no list of JSON, or no text; with its line.
        """
        self._at += 1  # the bracket
        while self._next() != "]":
            yield self._line_here(), self._item()
            mark = self._next()
            if mark == ",":
                self._at += 1
            elif mark != "]":
                raise self._fault("no ',' or ']' after an item")
        line = self._line_here()
        self._at += 1
        if self._next():
            raise DataError(f"{self._path}:{line}: something follows the end of the JSON list")

    def _next(self) -> str:
        """Go to the next character that is no white space; "" at the end."""
        while not (found := _NOT_SPACE.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._read_on():
                return ""
        self._at = found.start()
        return found.group()

    def _item(self) -> Any:
        while True:
            try:
                item, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_THE_END
                if not (cut_off and self._read_on()):
                    raise self._fault(error.msg) from error
            else:
                if self._is_whole or end < len(self._text) - _NEAR_THE_END:
                    self._at = end
                    return item
                self._read_on()  # a number may go on

    def _read_on(self) -> bool:
        """Let go of what is behind, and read at least as much again as is ahead; whether there was anything."""
        if self._is_whole:
            return False
        self._line_here()
        content = self._file.read(max(_PIECE, len(self._text) - self._at))
        pending = len(self._decoder.getstate()[0])
        try:
            decoded = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise not_utf8(str(self._path), error, before=self._num_bytes - pending) from error
        self._text = self._text[self._at :] + decoded
        self._at = self._counted = 0
        self._num_bytes, self._is_whole = self._num_bytes + len(content), not content
        return bool(content)

    def _line_here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _fault(self, what: str) -> DataError:
        return DataError(f"{self._path}:{self._line_here()}: not a list of JSON objects ({what})")


def not_utf8(where: str, error: UnicodeDecodeError, *, before: int = 0) -> DataError:
    """The error about bytes that are no text; `before` the ones that were being decoded stand so many others."""
    return DataError(f"{where}: not UTF-8 text (byte {before + error.start}); convert it, e.g. with iconv")
