"""Text to token ids, with a mark on every token that is trained on.

Notable decisions:
- plain text is trained on whole; of a prompt with completion only the completion, of a conversation only what
  the assistant says. What else a row may hold is in `data.columns`, how it is rendered in `data.conversations`;
- a document begins with the tokenizer's start token where the tokenizer adds one, and once: text that was rendered
  with a chat template has it already. Conversations begin as their template has it;
- each document ends with the tokenizer's end token, once, so that a model learns to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kd_plugin.data.conversations import Spans, render
from kd_plugin.data.corpus import Document, grouped
from kd_plugin.data.record import DataError, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["conversation_document", "encode", "prompt_ids"]

_TEXTS_PER_CALL, _CHARACTERS_PER_CALL = 256, 2**20
"""Fast tokenizers work on the texts of one call in parallel, and need some 100 bytes for each of their tokens."""
_AFTER_THE_END = 4  # tokens: the end token, what a template leaves behind it, what a tokenizer adds


def encode(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    teacher: Callable[[Record, Document], Document | str] | None = None,
) -> Iterator[Document | str | None]:
    """Tokenise records in order; a record that holds nothing to train on gives None.

    `teacher` adds what the teacher reads of a record to its document, or says why it is to be left out, which is then
    given instead.

    Raises:
        DataError: a conversation that the chat template cannot render, or renders unlike its beginning.
    """
    added = added_tokens(tokenizer)
    for group in grouped(records, _num_characters, _CHARACTERS_PER_CALL, _TEXTS_PER_CALL):
        texts = [record.values["text"] for record in group if record.form == "text"]
        # An empty list is refused by tokenizers.
        encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        for record in group:
            if record.form == "text":
                document = _plain(record, next(encoded), tokenizer, added)
            elif record.form == "messages":
                document = conversation_document(record, tokenizer)
            else:
                document = _completion(record, tokenizer, added)
            if document is None or not document.trained.any():
                yield None
            else:
                yield document if teacher is None else teacher(record, document)


def _num_characters(record: Record) -> int:
    if record.form == "messages":
        return sum(len(str(turn.get("content"))) for turn in record.values["messages"])
    return sum(len(value) for value in record.values.values())


def _plain(record: Record, ids: list[int], tokenizer: PreTrainedTokenizerBase, added: Added) -> Document | None:
    text = record.values["text"]
    ids = ids[added.once(ids, closed=_is_closed(text, ids, tokenizer))]
    return _ended(ids, [True] * len(ids), text, tokenizer, record.where) if text else None


def _completion(record: Record, tokenizer: PreTrainedTokenizerBase, added: Added) -> Document | None:
    prompt, completion = record.values["prompt"], record.values["completion"]
    if not completion:
        return None
    text = prompt + completion
    ids, trained = _marked(text, [(len(prompt), len(text))], tokenizer, special=True)
    if added.after:  # no character has made these, so no mark has reached them
        trained[-len(added.after) :] = [True] * len(added.after)
    once = added.once(ids, closed=_is_closed(text, ids, tokenizer))
    return _ended(ids[once], trained[once], text, tokenizer, record.where)


def conversation_document(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    """The document of a record of form `messages`; None where no assistant speaks.

    Raises:
        DataError: as `encode`.
    """
    messages = record.values["messages"]
    if not any(turn["role"] == "assistant" for turn in messages):
        return None
    text, spans = render(record, tokenizer)
    ids, trained = _marked(text, spans, tokenizer, special=False)
    last = messages[-1]["role"] == "assistant" and len(messages) - 1 not in record.values["untrained"]
    return _ended(ids, trained, text, tokenizer, record.where, trained_end=last)


def _marked(
    text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and whether each token begins inside one of `spans`."""
    if not tokenizer.is_fast:
        raise DataError("prompts and conversations need a fast tokenizer (tokenizer.json), to tell tokens by place")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    inside = np.zeros(len(starts), dtype=bool)
    for start, stop in spans:
        inside |= (starts >= start) & (starts < stop)
    return encoded["input_ids"], inside.tolist()


class Added(NamedTuple):
    """Ids that a tokenizer adds to every text by itself, before and after it."""

    before: list[int]
    after: list[int]

    def once(self, ids: list[int], *, closed: bool = False) -> slice:
        """The part of `ids` without added ids that the text itself begins with or, if it is `closed`, ends with."""
        begin, end = len(self.before), len(self.after)
        begun = begin and ids[:begin] == ids[begin : 2 * begin] == self.before
        return slice(begin if begun else 0, len(ids) - (end if closed else 0))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Added:
    """The ids that `tokenizer` puts before and behind a text: its start and end token, as a rule."""
    plain, whole = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    for begin in range(len(whole) - len(plain) + 1):
        end = begin + len(plain)
        if plain and whole[begin:end] == plain:
            return Added(whole[:begin], whole[end:])
    return Added([], [])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that a model is to continue: one start token if the tokenizer has it, and no end token."""
    added, ids = added_tokens(tokenizer), tokenizer(text, verbose=False)["input_ids"]
    ids = ids[: len(ids) - len(added.after)]
    return ids[Added(added.before, []).once(ids)]


def _ended(
    ids: list[int],
    trained: list[bool],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    trained_end: bool = True,
) -> Document:
    """Make a document that ends with one end token: texts often have it, and templates a line feed behind it."""
    end = tokenizer.eos_token_id
    if isinstance(end, int) and ids[-1:] != [end] and not _is_closed(text, ids, tokenizer):
        ids, trained = [*ids, end], [*trained, trained_end]
    return Document(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool), where)


def _is_closed(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the end token is the last thing that `text` says, and is among its last `ids`."""
    end = tokenizer.eos_token
    return isinstance(end, str) and text.rstrip().endswith(end) and tokenizer.eos_token_id in ids[-_AFTER_THE_END:]
