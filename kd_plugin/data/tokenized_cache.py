"""Tokenised documents on disk, shared by the ranks of a machine, by its runs and by their next starts.

Notable decisions:
- the key is a digest of all that the tokens follow from: content of the files, tokenizer, chat template, settings,
  and the code that reads and tokenises. What cannot be known by a digest is tokenised by every process, which is said,
  into files of its own that end with it;
- documents are written as they come, some at a time, and read from the mapped files: neither holds more in memory than
  a block of them and the index. Only `data.cache: null`, or a folder that cannot be used, holds all tokens in memory;
- who comes first writes, holding a lock, and everybody else waits for the lock and maps the file: no collective, which
  would time out while a large text is tokenised, and none that needs the machines to share a file system;
- a folder of the cache appears whole (a rename) or not at all, and one that cannot be read is written anew;
- the file is an Arrow stream that `datasets.Dataset.from_file` opens, too. It is mapped, so the ranks share its pages;
- what was warned of while tokenising is kept, and said again by each start that reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_plugin.data.corpus import ROW, Block, Corpus, Document, blocks_of
from kd_plugin.data.records import Source
from kd_plugin.data.tally import Tally
from kd_plugin.settings.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_plugin.settings.data import DataConfig

__all__ = ["cache_folder", "cached_documents"]

logger = logging.getLogger(__name__)

Tokenise = Callable[[Tally], Iterator[Document]]

_DOCUMENTS, _INDEX, _ABOUT = "documents.arrow", "index.npy", "about.json"
_said: set[str] = set()
"""What this process has warned of while tokenising."""
_PROBES = ("", "a", "A b\n\n c", "\u00e9\u4e2d\U0001f600 1234")
"""Texts whose ids stand for what a class of tokenizers does around its serialised part."""


def cached_documents(
    tokenise: Tokenise, source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[Corpus, Tally]:
    """The documents that `tokenise` makes, from the cache if they are there; they are left there otherwise.

    Args:
        tokenise: reads and tokenises, and fills the tally that it is given.
        source: what it reads.
        config: how; `cache` says where.
        tokenizer: with what.
        name: the setting that named the source, for messages.
    """
    folder = cache_folder(config)
    if folder is None:
        return _in_memory(tokenise)
    key = _key(source, config, tokenizer, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if key is not None:
            documents, tally = _shared(folder, key, tokenise, name)
        else:
            documents, tally = _own(folder, tokenise)
    except (OSError, NotImplementedError) as error:  # read-only, full, or a file system without locks
        said = "data.cache: %s cannot be used (%s), so every process tokenises %s, and holds its tokens in memory"
        logger.warning(said, folder, error, name)
        return _in_memory(tokenise)
    tally.warnings = [line for line in tally.warnings if line not in _said]
    _said.update(tally.warnings)
    return documents, tally


def _shared(folder: Path, key: str, tokenise: Tokenise, name: str) -> tuple[Corpus, Tally]:
    """The documents of the entry `key`, which is made if it is not there."""
    entry = folder / key
    with _locked(folder / f"{key}.lock", name):
        if found := _read_or_none(entry, name):
            logger.info("data.cache: %s was tokenised before, in %s", name, entry)
        else:
            _make(entry, tokenise)
        return found or _read(entry)


def _own(folder: Path, tokenise: Tokenise) -> tuple[Corpus, Tally]:
    """The documents in files that nobody else sees, and that the system frees with this process."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".own-", ignore_cleanup_errors=True) as own:
        _write(Path(own), tokenise)
        return _read(Path(own))  # a mapped file stays until it is unmapped, without its name


def _in_memory(tokenise: Tokenise) -> tuple[Corpus, Tally]:
    tally = Tally()
    return Corpus.of(tokenise(tally)), tally


def cache_folder(config: DataConfig) -> Path | None:
    """The folder that `data.cache` means; None for no cache."""
    if config.cache is None:
        return None
    if config.cache != "auto":
        return Path(config.cache).expanduser()
    if own := os.environ.get("KD_PLUGIN_CACHE"):
        return Path(own).expanduser() / "tokenized"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kd_plugin" / "tokenized"


def _key(source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """A digest of all that the tokens follow from; None where something of it has none."""
    content, tokens = source.identity(), _identity_of(tokenizer)
    if content is None or tokens is None:
        unknown = "the tokenizer is a slow one" if tokens is None else "which state of the hub is streamed is unknown"
        logger.info("data.cache: %s is tokenised by every process: %s", name, unknown)
        return None
    how = config.model_dump(include={"text_column", "columns", "train_on", "max_documents"})
    # The text itself, because an editable install has one version for many states of its code.
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [importlib.metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")]
    everything = json.dumps([content, tokens, how, code, versions], sort_keys=True)
    return hashlib.blake2b(everything.encode(), digest_size=16).hexdigest()


def _identity_of(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    if not tokenizer.is_fast:
        return None
    core: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  (of fast ones, which have no class of their own)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    probes = [tokenizer(text, verbose=False)["input_ids"] for text in _PROBES]
    return [type(tokenizer).__qualname__, core.to_str(), tokenizer.chat_template, special, probes]


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for another process that tokenises it (%s)", name, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(entry: Path, tokenise: Tokenise) -> None:
    """Make the folder `entry` of the documents that `tokenise` yields."""
    start = time.perf_counter()
    unfinished = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        num_tokens = _write(unfinished, tokenise)
        shutil.rmtree(entry, ignore_errors=True)  # one that cannot be read
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    logger.info("data.cache: tokenised %d tokens in %.1f s, kept in %s", num_tokens, seconds, entry)


def _write(folder: Path, tokenise: Tokenise) -> int:
    """Write the documents that `tokenise` yields into `folder`; returns the number of their tokens."""
    tally = Tally()
    with _recorded(tally.warnings):
        rows = _write_documents(folder / _DOCUMENTS, tokenise(tally))
    index = np.concatenate([np.empty(0, ROW), *rows])
    np.save(folder / _INDEX, index)
    num_tokens, size = int(index["length"].sum(dtype=np.int64)), (folder / _DOCUMENTS).stat().st_size
    about = {"tally": tally.to_json(), "num_tokens": num_tokens, "size": size}
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return num_tokens


def _write_documents(path: Path, documents: Iterator[Document]) -> list[np.ndarray]:
    """Write the documents as they come; returns their rows of the index, in parts."""
    require("pyarrow", "data.cache needs it (or set data.cache to null)")
    import pyarrow

    # Bytes for truth values, since those of Arrow are bits, which NumPy cannot map.
    kinds = {"input_ids": pyarrow.list_(pyarrow.int32()), "trained": pyarrow.list_(pyarrow.uint8())}
    schema = pyarrow.schema({**kinds, "where": pyarrow.string()})
    rows: list[np.ndarray] = []
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for block, its_rows in blocks_of(documents):
            bounds = np.append(its_rows["first"], len(block.input_ids)).astype(np.int32)
            columns = [
                _lists(kinds["input_ids"], bounds, block.input_ids),
                _lists(kinds["trained"], bounds, block.trained.view(np.uint8)),
                pyarrow.array(map(block.where, range(block.num_documents)), pyarrow.string()),
            ]
            stream.write_batch(pyarrow.record_batch(columns, schema=schema))
            rows.append(its_rows)
    return rows


def _lists(kind: Any, bounds: np.ndarray, values: np.ndarray) -> Any:
    """An Arrow array of lists over `values`, which are not copied; `pyarrow.array` would import pandas."""
    import pyarrow

    flat, offsets = (pyarrow.py_buffer(np.ascontiguousarray(each)) for each in (values, bounds))
    inner = pyarrow.Array.from_buffers(kind.value_type, len(values), [None, flat])
    return pyarrow.Array.from_buffers(kind, len(bounds) - 1, [None, offsets], children=[inner])


def _read_or_none(entry: Path, name: str) -> tuple[Corpus, Tally] | None:
    if not entry.exists():
        return None
    try:
        return _read(entry)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:  # another form, or cut off
        reason = str(error).partition("\n")[0]
        logger.warning("data.cache: %s is damaged (%s) and %s is tokenised again", entry, reason, name)
        return None


def _read(entry: Path) -> tuple[Corpus, Tally]:
    require("pyarrow", "data.cache needs it (or set data.cache to null)")
    import pyarrow

    about = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
    file = pyarrow.memory_map(str(entry / _DOCUMENTS))
    if file.size() != about["size"]:
        raise ValueError(f"{file.size()} bytes, and {about['size']} were written")
    index = np.load(entry / _INDEX, mmap_mode="r").view(np.ndarray)
    if index.dtype != ROW:
        raise ValueError(f"an index of {index.dtype.names}, and {ROW.names} are wanted")
    blocks = [_block_of(batch) for batch in pyarrow.ipc.open_stream(file)]
    documents = Corpus(blocks, index)
    written = sum(len(block.input_ids) for block in blocks)
    if not written == documents.num_tokens == about["num_tokens"]:
        raise ValueError("another number of tokens than was written")
    return documents, Tally.from_json(about["tally"])


def _block_of(batch: Any) -> Block:
    """The documents of one record batch, views of the mapped file."""
    places, ids, trained = batch.column("where"), batch.column("input_ids").values, batch.column("trained").values
    if len(ids) != len(trained):
        raise ValueError("as many marks as tokens were written, and are not there")
    return Block(_mapped(ids, np.int32), _mapped(trained, np.bool_), lambda at: places[at].as_py(), len(batch))


def _mapped(column: Any, dtype: type[np.generic]) -> np.ndarray:
    """The values of an Arrow array where they lie; its own `to_numpy` imports pandas, for more than a second."""
    return np.frombuffer(column.buffers()[1], dtype=dtype)[column.offset : column.offset + len(column)]


@contextmanager
def _recorded(lines: list[str]) -> Iterator[None]:
    """Append what the modules beside this one warn of to `lines`."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            _said.add(record.getMessage())

    recorder, here = Recorder(logging.WARNING), logging.getLogger(__package__)
    here.addHandler(recorder)
    try:
        yield
    finally:
        here.removeHandler(recorder)
