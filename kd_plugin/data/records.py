"""Where text comes from: one stream of records, whatever the source.

Notable decisions:
- a .txt file is one document; JSONL and Parquet rows, and the topics of `python_docs`, are one each;
- what a row means is for `data.columns`, and a row that means nothing is an error with its place, since a row
  skipped in silence is another experiment (empty text is skipped, and counted by the caller);
- what exists on disk goes before a dataset name of the same spelling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kd_plugin.data.columns import columns_of, form_of, record_of
from kd_plugin.data.record import DataError, Record
from kd_plugin.settings.extras import require

if TYPE_CHECKING:
    from kd_plugin.settings.run import DataConfig

__all__ = ["DataError", "Record", "check_source", "is_hub_dataset", "read_records", "refuse_unused"]

# A name with one of these is a file that is missing, not a dataset of the hub.
_FILE_ENDINGS = {
    ".arrow",
    ".csv",
    ".gz",
    ".json",
    ".jsonl",
    ".md",
    ".parquet",
    ".tsv",
    ".txt",
    ".zip",
    ".zst",
}


def read_records(source: str, config: DataConfig, *, name: str, split: str) -> Iterator[Record]:
    """Read the records of `source`, lazily, in an order that never changes.

    Args:
        source: `python_docs`, a .txt/.jsonl/.parquet file, a directory or glob of them, or a dataset name.
        config: for `text_column`, `subset` and `max_documents`.
        name: the setting that named the source, for errors.
        split: split of a hub dataset.

    Raises:
        DataError: nothing there, not readable, or columns that are no accepted form.
    """
    if source == "python_docs":
        return _python_docs()
    if is_hub_dataset(source):
        return _hub_dataset(source, config, name, split)
    files = _files(source, name)
    return (record for file in files for record in _READERS[file.suffix](file, config.text_column))


def is_hub_dataset(source: str) -> bool:
    """Whether `source` is read as a dataset's name: it looks like one and nothing on disk is called so."""
    if source == "python_docs" or Path(source).expanduser().exists() or Path(source).suffix in _FILE_ENDINGS:
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source) is not None


def check_source(source: str, name: str) -> None:
    """Find the files of `source` without reading them; nothing is asked about the hub.

    Raises:
        DataError: no such file, or none of an accepted kind; `name` is the setting that named it.
    """
    if source != "python_docs" and not is_hub_dataset(source):
        _files(source, name)


def refuse_unused(config: DataConfig) -> None:
    """Refuse settings about datasets of the hub where nothing is read from it.

    Raises:
        DataError: `subset`, `split` or `eval_split` is given and neither source is a dataset of the hub.
    """
    if is_hub_dataset(config.train) or (config.eval and is_hub_dataset(config.eval)):
        return
    given = {"subset": config.subset, "eval_split": config.eval_split}
    given["split"] = config.split if config.split != "train" else None
    for key, value in given.items():
        if value is not None:
            raise DataError(f"data.{key} is {value!r}, but {config.train!r} is no dataset name; remove data.{key}")


def _files(source: str, name: str) -> list[Path]:
    path = Path(source).expanduser()
    accepted = ", ".join(_READERS)
    if path.is_file():
        if path.suffix not in _READERS:
            raise DataError(f"{name}: {source} ends in {path.suffix!r}; give a file that ends in one of {accepted}")
        return [path]
    if path.is_dir():
        candidates = path.rglob("*")
    elif re.search(r"[*?\[]", source):
        root = Path(path.anchor)
        candidates = root.glob(str(path.relative_to(root)))
    else:
        raise DataError(f"{name}: no such file or directory: {source}")
    files = sorted(file for file in candidates if file.is_file() and file.suffix in _READERS)
    if not files:
        raise DataError(f"{name}: no file that ends in one of {accepted} in {source}")
    return files


def _python_docs() -> Iterator[Record]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Record("text", {"text": topics[topic]}, f"python_docs: {topic}")


def _text_file(path: Path, text_column: str) -> Iterator[Record]:
    try:
        yield Record("text", {"text": path.read_text(encoding="utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from error


def _jsonl_file(path: Path, text_column: str) -> Iterator[Record]:
    # Bytes, so that an undecodable line is found with its number.
    with path.open("rb") as lines:
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
            yield record_of(row, text_column, where)


def _parquet_file(path: Path, text_column: str) -> Iterator[Record]:
    require("pyarrow", "Parquet files need it")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error
    with file:
        names = file.schema_arrow.names
        form = form_of(names, text_column, str(path))
        wanted = columns_of(form, text_column)
        if form == "messages":  # of which a template may read one
            wanted |= {field.name for field in file.schema_arrow if not pyarrow.types.is_nested(field.type)}
        batches = file.iter_batches(columns=[name for name in names if name in wanted])
        rows = (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
        for number, row in enumerate(_read_through(rows, f"{path}: not a readable Parquet file"), 1):
            yield record_of(row, text_column, f"{path}: row {number}", padded=True)


def _hub_dataset(source: str, config: DataConfig, name: str, split: str) -> Iterator[Record]:
    require("datasets", "datasets of the hub need it")
    import datasets

    try:
        # Streaming downloads no more than the documents asked for.
        dataset = datasets.load_dataset(source, config.subset, split=split, streaming=config.max_documents is not None)
    except Exception as error:  # not found, no such split or subset, no connection, or whatever a builder raises
        raise DataError(
            f"{name}: no file {source!r} here, and as a dataset it cannot be loaded: {_first_line(error)}"
        ) from error
    rows = cast("Iterable[Mapping[str, Any]]", dataset)  # of one split, and one by one
    for number, row in enumerate(_read_through(rows, f"{name}: {source} ({split}) cannot be read to its end"), 1):
        yield record_of(row, config.text_column, f"{source} ({split}): row {number}", padded=True)


def _read_through(rows: Iterable[Mapping[str, Any]], what: str) -> Iterator[Mapping[str, Any]]:
    """Yield `rows`, and turn whatever their library raises on the way into one line."""
    try:
        yield from rows
    except Exception as error:
        raise DataError(f"{what} ({_first_line(error)})") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _text_file,
    ".jsonl": _jsonl_file,
    ".parquet": _parquet_file,
}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
