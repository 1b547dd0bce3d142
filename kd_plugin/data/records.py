"""Where text comes from: one stream of records, whatever the source.

Notable decisions:
- files are read by `data.files`; the topics of `python_docs` and the rows of a dataset are one document each;
- what a row means is for `data.columns`, and a row that means nothing is an error with its place, since a row
  skipped in silence is another experiment (empty text is skipped, and counted by the caller);
- what exists on disk goes before a dataset name of the same spelling.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd_plugin.data.columns import RowReader
from kd_plugin.data.files import ACCEPTED, first_line, is_readable, read_file, read_through
from kd_plugin.data.record import DataError, Record
from kd_plugin.settings.extras import require

if TYPE_CHECKING:
    from kd_plugin.settings.data import DataConfig

__all__ = ["DataError", "Source", "check_source", "has_splits", "is_hub_dataset", "open_source", "refuse_unused"]

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
_READ_WHOLE = 2**28  # bytes; hashed in a third of a second
_END = 2**20
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""What `save_to_disk` leaves in the folder of a dataset, and in that of several splits."""


class Source(NamedTuple):
    """A place that records come from, opened but not read."""

    records: Callable[[RowReader], Iterator[Record]]
    """Reads them, lazily, in an order that never changes."""

    identity: Callable[[], object]
    """What JSON can hold, and what is another as soon as the content is; None where that cannot be known."""


def open_source(source: str, config: DataConfig, *, name: str, split: str) -> Source:
    """Find `source` and say how its records are read; their faults show only then.

    Args:
        source: `python_docs`, a file, a directory or glob of them, a folder of `save_to_disk`, or a dataset name.
        config: for `subset`, `streaming` and `max_documents`.
        name: the setting that named the source, for errors.
        split: split of a hub dataset, or of a folder with several.

    Raises:
        DataError: nothing there, or nothing that can be loaded.
    """
    if source == "python_docs":
        return Source(lambda rows: _python_docs(), lambda: [sys.version, _digest(repr(list(_python_docs())).encode())])
    if is_hub_dataset(source):
        dataset, known = _hub_dataset(source, config, name, split)
        return Source(partial(_of_dataset, dataset, f"{source} ({split})", name), lambda: known)
    if saved := _saved_kind(source):
        where = f"{source} ({split})" if saved == _SAVED_SPLITS else source
        files = sorted(file for file in Path(source).expanduser().rglob("*") if file.is_file())
        read = partial(_of_dataset, _saved_dataset(source, name, split), where, name)
        return Source(read, lambda: [split, *map(_identity, files)])
    files = _files(source, name)
    return Source(
        lambda rows: (record for file in files for record in read_file(file, rows)),
        lambda: [_identity(file) for file in files],
    )


def _identity(file: Path) -> tuple[str, int, str]:
    """Name, size and content of a file; of a large one both ends and the time of its last change instead."""
    about = file.stat()
    with file.open("rb") as content:
        if about.st_size <= _READ_WHOLE:
            return str(file), about.st_size, hashlib.file_digest(content, _new_digest).hexdigest()
        ends = content.read(_END)
        content.seek(-_END, os.SEEK_END)
        return str(file), about.st_size, f"{about.st_mtime_ns} {_digest(ends + content.read())}"


def _new_digest(content: bytes = b"") -> Any:
    return hashlib.blake2b(content, digest_size=16)


def _digest(content: bytes) -> str:
    return _new_digest(content).hexdigest()


def is_hub_dataset(source: str) -> bool:
    """Whether `source` is read as a dataset's name: it looks like one and nothing on disk is called so."""
    if source == "python_docs" or Path(source).expanduser().exists() or Path(source).suffix in _FILE_ENDINGS:
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source) is not None


def has_splits(source: str) -> bool:
    """Whether `data.split` means something for `source`: a dataset's name, or a folder with several splits."""
    return is_hub_dataset(source) or _saved_kind(source) == _SAVED_SPLITS


def check_source(source: str, name: str) -> None:
    """Find the files of `source` without reading them; nothing is asked about the hub.

    Raises:
        DataError: no such file, or none of an accepted kind; `name` is the setting that named it.
    """
    if source != "python_docs" and not is_hub_dataset(source) and not _saved_kind(source):
        _files(source, name)


def refuse_unused(config: DataConfig) -> None:
    """Refuse settings about datasets of the hub where nothing is read from it.

    Raises:
        DataError: `subset`, `split`, `eval_split` or `streaming` is given and no source is a dataset of the hub, or has
            splits.
    """
    for name, source, read in config.sources():
        where = "data" if isinstance(config.train, str) else name
        given = {"subset": read.subset, "split": read.split if read.split != "train" else None}
        for setting, value in given.items():
            own = isinstance(config.train, str) or getattr(source, setting) is not None
            if value is not None and own and not _heeds(setting, [read.train, config.eval]):
                raise DataError(
                    f"{where}.{setting} is {value!r}, but {source.source!r} is no dataset name; "
                    f"remove {where}.{setting}"
                )
    sources = [source.source for _, source, _ in config.sources()]
    if config.streaming and not any(map(is_hub_dataset, filter(None, [*sources, config.eval]))):
        raise DataError(f"data.streaming is true, but {sources[0]!r} is no dataset name; remove data.streaming")
    if config.eval_split is None or any(map(has_splits, filter(None, [config.eval]))):
        return
    if without := [source for source in sources if not has_splits(source)]:
        raise DataError(
            f"data.eval_split is {config.eval_split!r}, but {without[0]!r} is no dataset name; remove data.eval_split"
        )


def _heeds(setting: str, sources: Iterable[Any]) -> bool:
    takes = is_hub_dataset if setting == "subset" else has_splits
    return any(takes(source) for source in sources if isinstance(source, str))


def _files(source: str, name: str) -> list[Path]:
    """The files of `source`, sorted.

    Raises:
        DataError: no such file, or none of an accepted kind; `name` is the setting that named it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not is_readable(path):
            raise DataError(f"{name}: {source} ends in {path.suffix!r}; give a file that ends in one of {ACCEPTED}")
        return [path]
    if path.is_dir():
        candidates = path.rglob("*")
    elif re.search(r"[*?\[]", source):
        root = Path(path.anchor)
        candidates = root.glob(str(path.relative_to(root)))
    else:
        foreign = path.suffix in _FILE_ENDINGS and not is_readable(path)
        also = f" (and {path.suffix!r} is not read: {ACCEPTED} are)" if foreign else ""
        raise DataError(f"{name}: no such file or directory: {source}{also}")
    files = sorted(file for file in candidates if file.is_file() and is_readable(file))
    if not files:
        raise DataError(f"{name}: no file that ends in one of {ACCEPTED} in {source}")
    return files


def _python_docs() -> Iterator[Record]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Record("text", {"text": topics[topic]}, f"python_docs: {topic}")


def _saved_kind(source: str) -> str:
    """The name of the file by which a folder of `save_to_disk` is known; empty for anything else."""
    folder = Path(source).expanduser()
    return next((kind for kind in (_SAVED_SPLITS, _SAVED) if (folder / kind).is_file()), "")


def _saved_dataset(source: str, name: str, split: str) -> Iterable[Mapping[str, Any]]:
    require("datasets", "folders of save_to_disk need it")
    import datasets

    try:
        dataset: Any = datasets.load_from_disk(str(Path(source).expanduser()))
    except Exception as error:  # files that are missing or damaged, each with an error of its own
        raise DataError(f"{name}: {source} cannot be loaded: {first_line(error)}") from error
    if not isinstance(dataset, dict):  # of splits
        return dataset
    if split not in dataset:
        raise DataError(f"{name}: {source} has no split {split!r}, only {', '.join(dataset)}; set data.split")
    return dataset[split]


def _hub_dataset(
    source: str, config: DataConfig, name: str, split: str
) -> tuple[Iterable[Mapping[str, Any]], list[str] | None]:
    """A dataset of the hub, and what is another as soon as it is; None where that cannot be known."""
    require("datasets", "datasets of the hub need it")
    import datasets

    try:
        # Streaming downloads no more than the documents asked for.
        if config.streaming or config.max_documents is not None:
            builder: Any = datasets.load_dataset_builder(source, config.subset)
            return builder.as_streaming_dataset(split=split), _commit_of(builder, split)
        dataset: Any = datasets.load_dataset(source, config.subset, split=split)
        return dataset, [dataset._fingerprint]
    except Exception as error:  # not found, no such split or subset, no connection, or whatever a builder raises
        raise DataError(
            f"{name}: no file {source!r} here, and as a dataset it cannot be loaded: {first_line(error)}"
        ) from error


def _commit_of(builder: Any, split: str) -> list[str] | None:
    """The commit of the hub that is streamed, with the configuration and split of it."""
    commit = builder.hash or ""
    return [commit, builder.config_id, split] if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _of_dataset(dataset: Iterable[Mapping[str, Any]], where: str, name: str, rows: RowReader) -> Iterator[Record]:
    for number, row in enumerate(read_through(dataset, f"{name}: {where} cannot be read to its end"), 1):
        yield rows.record(row, f"{where}: row {number}", padded=True)
