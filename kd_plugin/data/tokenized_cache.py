"""Tokenised documents on disk, shared by the ranks of a machine, by its runs and by their next starts.

Notable decisions:
- the key is a digest of all that the tokens follow from: content of the files, tokenizer, chat template, settings,
  and the code that reads and tokenises. What cannot be known by a digest is tokenised by every process, which is said;
- who comes first writes, holding a lock, and everybody else waits for the lock and maps the file: no collective, which
  would time out while a large text is tokenised, and none that needs the machines to share a file system;
- a folder of the cache appears whole (a rename) or not at all, and one that cannot be read is written anew;
- the file is an Arrow stream that `datasets.Dataset.from_file` opens, too. It is mapped, so the ranks share its pages;
- what was warned of while tokenising is kept, and said again by each start that reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
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

from kd_plugin.data.packing import Document
from kd_plugin.data.records import Source
from kd_plugin.data.tally import Tally
from kd_plugin.settings.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_plugin.settings.data import DataConfig

__all__ = ["cache_folder", "cached_documents"]

logger = logging.getLogger(__name__)

Tokenise = Callable[[Tally], Iterator[Document]]

_DOCUMENTS, _ABOUT = "documents.arrow", "about.json"
_PER_BATCH = 1024  # documents that are held while the file is written
_said: set[str] = set()
"""What this process has warned of while tokenising."""
_PROBES = ("", "a", "A b\n\n c", "\u00e9\u4e2d\U0001f600 1234")
"""Texts whose ids stand for what a class of tokenizers does around its serialised part."""


def cached_documents(
    tokenise: Tokenise, source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[Document], Tally]:
    """The documents that `tokenise` makes, from the cache if they are there; they are left there otherwise.

    Args:
        tokenise: reads and tokenises, and fills the tally that it is given.
        source: what it reads.
        config: how; `cache` says where.
        tokenizer: with what.
        name: the setting that named the source, for messages.
    """
    folder = cache_folder(config)
    key = None if folder is None else _key(source, config, tokenizer, name)
    if folder is None or key is None:
        return _uncached(tokenise)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock", name):
            entry = folder / key
            if found := _read_or_none(entry, name):
                logger.info("data.cache: %s was tokenised before, in %s", name, entry)
            else:
                _write(entry, tokenise)
            documents, tally = found or _read(entry)
            tally.warnings = [line for line in tally.warnings if line not in _said]
            _said.update(tally.warnings)
            return documents, tally
    except (OSError, NotImplementedError) as error:  # read-only, full, or a file system without locks
        logger.warning("data.cache: %s cannot be used (%s), so every process tokenises %s", folder, error, name)
        return _uncached(tokenise)


def _uncached(tokenise: Tokenise) -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(tokenise(tally)), tally


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
    unknown = "the text is streamed" if content is None else "the tokenizer is a slow one" if tokens is None else ""
    if unknown:
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


def _write(entry: Path, tokenise: Tokenise) -> None:
    """Make the folder `entry` of the documents that `tokenise` yields."""
    tally, start = Tally(), time.perf_counter()
    unfinished = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        with _recorded(tally.warnings):
            num_tokens = _write_documents(unfinished / _DOCUMENTS, tokenise(tally))
        size = (unfinished / _DOCUMENTS).stat().st_size
        about = {"tally": tally.to_json(), "num_tokens": num_tokens, "size": size}
        (unfinished / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # one that cannot be read
        unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    seconds = time.perf_counter() - start
    logger.info("data.cache: tokenised %d tokens in %.1f s, kept in %s", num_tokens, seconds, entry)


def _write_documents(path: Path, documents: Iterator[Document]) -> int:
    """Write the documents as they come; returns the number of their tokens."""
    require("pyarrow", "data.cache needs it (or set data.cache to null)")
    import pyarrow

    # Bytes for truth values, since those of Arrow are bits, which NumPy cannot map.
    kinds = {"input_ids": pyarrow.list_(pyarrow.int32()), "trained": pyarrow.list_(pyarrow.uint8())}
    schema = pyarrow.schema({**kinds, "where": pyarrow.string()})
    num_tokens = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        while group := list(itertools.islice(documents, _PER_BATCH)):
            num_tokens += sum(len(document.input_ids) for document in group)
            columns = {
                "input_ids": [document.input_ids for document in group],
                "trained": [document.trained.view(np.uint8) for document in group],
                "where": [document.where for document in group],
            }
            stream.write_batch(pyarrow.record_batch(columns, schema=schema))
    return num_tokens


def _read_or_none(entry: Path, name: str) -> tuple[list[Document], Tally] | None:
    if not entry.exists():
        return None
    try:
        return _read(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of pyarrow, JSON, or another form
        reason = str(error).partition("\n")[0]
        logger.warning("data.cache: %s is damaged (%s) and %s is tokenised again", entry, reason, name)
        return None


def _read(entry: Path) -> tuple[list[Document], Tally]:
    require("pyarrow", "data.cache needs it (or set data.cache to null)")
    import pyarrow

    about = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
    file = pyarrow.memory_map(str(entry / _DOCUMENTS))
    if file.size() != about["size"]:
        raise ValueError(f"{file.size()} bytes, and {about['size']} were written")
    documents = [document for batch in pyarrow.ipc.open_stream(file) for document in _documents_of(batch)]
    if sum(len(document.input_ids) for document in documents) != about["num_tokens"]:
        raise ValueError("another number of tokens than was written")
    return documents, Tally.from_json(about["tally"])


def _documents_of(batch: Any) -> Iterator[Document]:
    """The documents of one record batch, views of the mapped file."""
    ids, trained = batch.column("input_ids"), batch.column("trained")
    all_ids, all_trained = _mapped(ids.values, np.int32), _mapped(trained.values, np.bool_)
    bounds = _mapped(ids.offsets, np.int32)
    if not np.array_equal(bounds, _mapped(trained.offsets, np.int32)):
        raise ValueError("as many marks as tokens were written, and are not there")
    for index, where in enumerate(batch.column("where").to_pylist()):
        part = slice(bounds[index], bounds[index + 1])
        yield Document(all_ids[part], all_trained[part], where)


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
