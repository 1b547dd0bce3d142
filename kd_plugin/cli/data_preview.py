"""What a run will read: a table of its data, what was left out and why, and its first sequences with their marks."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.documents import load_documents
from kd_plugin.data.isolated import pack
from kd_plugin.data.teacher_text import teacher_reader_of
from kd_plugin.estimate.tables import Table, show_tables
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.tokenizers import tokenizer_of

__all__ = ["marked", "show_data"]

Decode = Callable[[list[int]], str]


def show_data(config: RunConfig, num_sequences: int) -> None:
    """Load the data of a run with its tokenizer, and print what it is; no model is loaded.

    Args:
        config: the run.
        num_sequences: how many training sequences are shown, from the first.

    Raises:
        ValueError: tokenizer or data cannot be loaded; `data.DataError` names file and line of a bad row.
    """
    tokenizer = tokenizer_of(config)
    with _said() as notes:
        train, held_out = load_documents(config.data, tokenizer, teacher_reader_of(config, tokenizer))
        dataset = pack(
            train,
            config.data,
            config.distill.ignore_index,
            seed=config.train.seed,
            keep_tail=False,
            soft_on_all=config.distill.soft_everywhere,
        )
    show_tables([_table(train, held_out, config.data.seq_len)], notes)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for index in range(min(num_sequences, len(dataset))):
        item = dataset[index]
        trained = item["labels"] != config.distill.ignore_index
        about = f"{len(trained)} tokens, {int(trained.sum())} trained on"
        if "scored" in item:
            about += f", {int(item['scored'].sum())} in the soft loss"
        print(f"\nsequence {index + 1} of {len(dataset)}: {about}")
        padding = dataset.num_padding(index)
        shown = len(trained) - padding
        _print_marked(marked(item["input_ids"][:shown], trained[:shown], decode))
        if padding:
            print(f"({padding} tokens of padding)")
    if num_sequences and train[0].teacher is not None:
        _show_both(train[0], decode)


def _show_both(document: Document, decode: Decode) -> None:
    """Print what the student and the teacher read of a conversation."""
    assert document.teacher is not None
    ids, at = document.teacher
    trained = np.zeros(len(ids), dtype=bool)
    trained[at[at >= 0]] = True
    for who, tokens, marks in (("student", document.input_ids, document.trained), ("teacher", ids, trained)):
        print(f"\nthe first conversation as the {who} reads it: {len(tokens)} tokens")
        _print_marked(marked(tokens, marks, decode))


def marked(ids: np.ndarray, trained: np.ndarray, decode: Decode) -> list[tuple[str, bool]]:
    """The text of `ids` in pieces that are trained on, or not, throughout.

    Args:
        ids: token ids, int [n].
        trained: bool [n].
        decode: ids -> text.
    """
    bounds = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    pieces, before = [], ""
    for start, stop in itertools.pairwise(bounds):
        # Of all so far, since many tokenizers drop the space in front of the first token.
        text = decode(ids[:stop].tolist())
        piece = text.removeprefix(before) if text.startswith(before) else decode(ids[start:stop].tolist())
        pieces.append((piece, bool(trained[start])))
        before = text
    return pieces


def _print_marked(pieces: Sequence[tuple[str, bool]]) -> None:
    if not sys.stdout.isatty():
        print("".join(f"[[{text}]]" if trained else text for text, trained in pieces))
        return
    from rich.console import Console
    from rich.text import Text

    styles: dict[bool, str] = {True: "bold green", False: "dim"}
    console = Console(highlight=False)
    console.print(Text.assemble(*((text, styles[trained]) for text, trained in pieces)))


def _table(train: Corpus, held_out: Corpus, seq_len: int) -> Table:
    columns = [_column(documents, seq_len) for documents in (train, held_out)]
    rows = [(name, value, columns[1][name]) for name, value in columns[0].items()]
    return Table("data", ("", "training", "held out"), rows)


def _column(documents: Corpus, seq_len: int) -> dict[str, str]:
    lengths, trained = documents.lengths, int(documents.column("num_trained").sum(dtype=np.int64))
    shares = {"shortest": 0, "median": 50, "90 % are no longer than": 90, "longest": 100}
    return {
        "documents": f"{len(lengths):,}",
        "tokens": f"{lengths.sum():,}",
        "trained on": f"{trained:,} ({100 * trained / lengths.sum():.1f} %)",
        **{f"tokens, {name}": f"{np.percentile(lengths, share):,.0f}" for name, share in shares.items()},
        f"longer than data.seq_len, {seq_len}": f"{int((lengths > seq_len).sum()):,}",
    }


@contextmanager
def _said() -> Iterator[list[str]]:
    """The lines that reading the data logs, warnings marked as such."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            mark = "warning: " if record.levelno >= logging.WARNING else ""
            lines.append(mark + record.getMessage())

    collector, package = Collector(), logging.getLogger("kd_plugin.data")
    before: Any = package.level
    package.addHandler(collector)
    package.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        package.removeHandler(collector)
        package.setLevel(before)
