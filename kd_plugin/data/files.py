"""Files of rows, each row a record with its file and line.

Notable decisions:
- a .txt file is one document; each row of the others is one. All but Parquet may be compressed (.gz);
- text is read line by line as bytes, so that one that cannot be decoded is found with its number;
- a .json file is a list of objects, each found with the line that it begins in, or JSON Lines under another name;
- rows pass by, of Parquet some at a time, and no file is held whole but a .txt file, which is one document.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from kd_plugin.data.columns import RowReader
from kd_plugin.data.json_list import JsonList, not_utf8
from kd_plugin.data.record import DataError, Record
from kd_plugin.settings.extras import require

__all__ = ["ACCEPTED", "first_line", "is_readable", "read_file", "read_through"]

logger = logging.getLogger(__name__)

_LARGE_TEXT = 2**27  # characters; to tokenise as many takes some 5 GB
_ROWS_AT_ONCE = 256  # of Parquet, as objects of Python
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
        raise not_utf8(str(path), error) from error


def _text_file(path: Path, rows: RowReader) -> Iterator[Record]:
    text = _text_of(path)
    if len(text) >= _LARGE_TEXT:
        logger.warning(
            "%s: %d million characters are one document, which is tokenised whole, in many times its size of memory; "
            "in a .jsonl file each line is one",
            *(path, len(text) // 10**6),
        )
    yield Record("text", {"text": text}, str(path))


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
    with _open(path) as file:
        content = JsonList(file, path)
        if not content.is_list():
            yield from _jsonl_file(path, rows)
            return
        for number, row in content.items():
            where = f"{path}:{number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}; each item has to be an object with columns")
            yield rows.record(row, where)


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
            raise not_utf8(f"{path}:{number}", error) from error


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
        batches = file.iter_batches(_ROWS_AT_ONCE, columns=columns)
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
