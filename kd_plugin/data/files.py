"""Files of rows, each row a record with its file and line.

Notable decisions:
- a .txt file is one document; each row of the others is one. All but Parquet may be compressed (.gz);
- text is read line by line as bytes, so that one that cannot be decoded is found with its number;
- a .json file is a list of objects, each found with the line that it begins in, or JSON Lines under another name.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from kd_plugin.data.columns import RowReader
from kd_plugin.data.record import DataError, Record
from kd_plugin.settings.extras import require

__all__ = ["ACCEPTED", "first_line", "is_readable", "read_file", "read_through"]

_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072, which a document may exceed


def read_file(path: Path, rows: RowReader) -> Iterator[Record]:
    """Read the records of one file, lazily and in order.

    Raises:
        DataError: not readable, or a row that is no record; the message begins with the file and, for rows, the line.
    """
    try:
        yield from _READERS[_kind(path)](path, rows)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a readable gzip file ({first_line(error)})") from error


def is_readable(path: Path) -> bool:
    """Whether the name of `path` ends as those do that `read_file` reads."""
    return _kind(path) in _READERS and not (path.suffix == ".gz" and _kind(path) == ".parquet")


def read_through(rows: Iterable[Mapping[str, Any]], what: str) -> Iterator[Mapping[str, Any]]:
    """Yield `rows`, and turn whatever their library raises on the way into one line."""
    try:
        yield from rows
    except Exception as error:
        raise DataError(f"{what} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _text_of(path: Path) -> str:
    with _open(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where}: not UTF-8 text (byte {error.start}); convert it, e.g. with iconv")


def _text_file(path: Path, rows: RowReader) -> Iterator[Record]:
    yield Record("text", {"text": _text_of(path)}, str(path))


def _jsonl_file(path: Path, rows: RowReader) -> Iterator[Record]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                raise DataError(f"{where}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}; each line has to be an object with columns")
            yield rows.record(row, where)


def _json_file(path: Path, rows: RowReader) -> Iterator[Record]:
    text = _text_of(path)
    if not text.lstrip().startswith("["):
        yield from _jsonl_file(path, rows)
        return
    for number, row in _json_items(text, path):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}; each item has to be an object with columns")
        yield rows.record(row, where)


def _json_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The items of the JSON list `text`, each with the line that it begins in."""
    decoder = json.JSONDecoder()
    counted, line = 0, 1
    place = _next(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            item, end = decoder.raw_decode(text, place)
        except ValueError as error:
            raise DataError(f"{path}:{line}: not a list of JSON objects ({error})") from error
        yield line, item
        place = _next(text, end)
        if text[place : place + 1] == ",":
            place = _next(text, place + 1)
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise DataError(f"{path}:{line}: not a list of JSON objects (no ',' or ']' after an item)")
    if _next(text, place + 1) < len(text):
        raise DataError(f"{path}:{text.count(chr(10), 0, place) + 1}: something follows the end of the JSON list")


def _next(text: str, place: int) -> int:
    """The first place from `place` on that is no white space."""
    found = _NOT_SPACE.search(text, place)
    return found.start() if found else len(text)


def _table_file(path: Path, rows: RowReader) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with _open(path) as file:
        lines = csv.reader(_decoded(file, path), delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
        try:
            names = next(lines, [])
            begin = lines.line_num + 1
            for cells in lines:
                where, begin = f"{path}:{begin}", lines.line_num + 1
                if not cells:  # an empty line
                    continue
                if len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cell(s), and the first line has {len(names)} columns")
                yield rows.record(dict(zip(names, cells, strict=True)), where)
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: not a row of a table ({error})") from error


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}:{number}", error) from error


def _parquet_file(path: Path, rows: RowReader) -> Iterator[Record]:
    require("pyarrow", "Parquet files need it")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    with file:
        flat = [field.name for field in file.schema_arrow if not pyarrow.types.is_nested(field.type)]
        columns = rows.columns_to_read(file.schema_arrow.names, flat, str(path))
        batches = file.iter_batches(columns=columns)
        read = (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
        for number, row in enumerate(read_through(read, f"{path}: not a readable Parquet file"), 1):
            yield rows.record(row, f"{path}: row {number}", padded=True)


_READERS: dict[str, Callable[[Path, RowReader], Iterator[Record]]] = {
    ".txt": _text_file,
    ".jsonl": _jsonl_file,
    ".json": _json_file,
    ".csv": _table_file,
    ".tsv": _table_file,
    ".parquet": _parquet_file,
}
ACCEPTED = ", ".join(_READERS) + " or (but for Parquet) these with .gz"
"""Endings of the names of files that are read, in words."""
