"""Documents: text to token ids, with a mark on every token that is trained on.

Notable decisions:
- plain text is trained on whole; of a prompt with completion only the completion, of a conversation only what
  the assistant says (by the chat template's own marks, or else by rendering it turn by turn);
- each document ends with the tokenizer's end token, so that a model learns to stop;
- held-out documents are chosen by their content, so that copies of one document are never on both sides and
  neither seed nor order matters. A single document is cut in two instead.
Packing and batches are in `kd_plugin.packing`, whose names are offered here too.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kd_plugin.data_sources import DataError, Record, read_records, refuse_unused
from kd_plugin.packing import Batch, PackedDataset, TrainBatches, collate, eval_batches, indices_for_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_plugin.config import DataConfig

__all__ = [
    "Batch",
    "DataError",
    "Document",
    "PackedDataset",
    "TrainBatches",
    "collate",
    "encode",
    "eval_batches",
    "indices_for_step",
    "load_datasets",
    "load_documents",
    "split_documents",
]

logger = logging.getLogger(__name__)

_TEXTS_PER_CALL = 256  # fast tokenizers work on the texts of one call in parallel
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Document(NamedTuple):
    """One tokenised document."""

    input_ids: np.ndarray
    """int32 [n]."""

    trained: np.ndarray
    """bool [n]: whether the token is a target."""


def load_documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; the same on every rank.

    Raises:
        DataError: nothing found, no accepted columns, nothing to train on, or a setting without effect.
    """
    refuse_unused(config)
    train = _read(config.train, config, tokenizer, name="data.train", split=config.split)
    if config.eval is not None:
        split = config.eval_split or config.split
        return train, _read(config.eval, config, tokenizer, name="data.eval", split=split)
    if config.eval_split is not None:
        return train, _read(config.train, config, tokenizer, name="data.eval_split", split=config.eval_split)
    train, held_out = split_documents(train, config.eval_fraction)
    logger.info("data.eval_fraction: %d document(s) held out, %d left to train on", len(held_out), len(train))
    return train, held_out


def load_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, ignore_index: int
) -> tuple[PackedDataset, PackedDataset]:
    """Training and held-out sequences of `seq_len` tokens; errors as of `load_documents` and `PackedDataset`."""
    train, held_out = load_documents(config, tokenizer)
    return (
        PackedDataset(train, config.seq_len, ignore_index),
        PackedDataset(held_out, config.seq_len, ignore_index, keep_tail=True),
    )


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out about `fraction` of the documents (one at least); returns (training, held out).

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(documents) == 1:
        return _cut_in_two(documents[0], fraction)
    digests = [hashlib.sha256(document.input_ids.tobytes()).digest() for document in documents]
    copies = Counter(digests)
    wanted = max(1, round(len(documents) * fraction))
    chosen: set[bytes] = set()
    for digest in sorted(copies):
        if sum(copies[taken] for taken in chosen) >= wanted:
            break
        chosen.add(digest)
    train = [document for document, digest in zip(documents, digests, strict=True) if digest not in chosen]
    held_out = [document for document, digest in zip(documents, digests, strict=True) if digest in chosen]
    if not train:
        raise DataError(
            f"data.eval_fraction {fraction} of {len(documents)} documents ({len(copies)} different) leaves "
            "nothing to train on; lower it, or name held-out text with data.eval"
        )
    return train, held_out


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document | None]:
    """Tokenise records in order; None for one that holds nothing to train on.

    Raises:
        DataError: a conversation that the chat template cannot render, or renders unlike its beginning.
    """
    records = iter(records)
    while group := list(itertools.islice(records, _TEXTS_PER_CALL)):
        texts = [record.values["text"] for record in group if record.form == "text"]
        # An empty list is refused by tokenizers.
        encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        for record in group:
            if record.form == "text":
                ids = next(encoded)
                document = _ended(ids, [True] * len(ids), tokenizer) if record.values["text"] else None
            elif record.form == "messages":
                document = _conversation(record.values["messages"], tokenizer, record.where)
            else:
                document = _completion(record.values["prompt"], record.values["completion"], tokenizer)
            yield document if document is not None and document.trained.any() else None


def _read(
    source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, name: str, split: str
) -> list[Document]:
    forms: Counter[str] = Counter()

    def counted() -> Iterator[Record]:
        records = read_records(source, config, name=name, split=split)
        for record in itertools.islice(records, config.max_documents):
            forms[record.form] += 1
            yield record

    documents = [document for document in encode(counted(), tokenizer) if document is not None]
    if not documents:
        raise DataError(f"{name}: {source} has no text to train on ({sum(forms.values())} records read)")
    found = ", ".join(f"{count} x {form}" for form, count in forms.items())
    num_tokens = sum(len(document.input_ids) for document in documents)
    logger.info("%s: %s in %s; %d documents, %d tokens", name, found, source, len(documents), num_tokens)
    if skipped := sum(forms.values()) - len(documents):
        logger.warning("%s: %d record(s) without a token to train on were left out", name, skipped)
    if tokenizer.eos_token_id is None:
        logger.warning("%s: the tokenizer has no end token, so documents end without one", name)
    return documents


def _cut_in_two(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    size = len(document.input_ids)
    cut = size - max(1, round(size * fraction))
    if cut < 1:
        raise DataError(f"one document of {size} token(s) cannot be cut in two; name held-out text with data.eval")
    logger.info("data.eval_fraction: the last %d of the only document's %d tokens are held out", size - cut, size)
    parts = [Document(document.input_ids[part], document.trained[part]) for part in (slice(cut), slice(cut, None))]
    return parts[:1], parts[1:]


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    if not completion:
        return None
    ids, trained = _marked(prompt + completion, [(len(prompt), len(prompt + completion))], tokenizer, special=True)
    # An end token that the tokenizer adds itself has no characters, so no mark has reached it.
    trained[-1] = True
    return _ended(ids, trained, tokenizer)


def _conversation(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> Document | None:
    if not any(turn["role"] == "assistant" for turn in messages):
        return None
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: 'messages' need a chat template, which this tokenizer lacks; use an instruct model's"
        )
    from jinja2 import TemplateError  # comes with chat templates

    try:
        if _GENERATION_MARK.search(tokenizer.get_chat_template()):
            text, spans = _generation_spans(messages, tokenizer)
        else:
            text, spans = _assistant_spans(messages, tokenizer, where)
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error
    ids, trained = _marked(text, spans, tokenizer, special=False)
    # Templates often close a turn themselves, with the end token and a line feed.
    if tokenizer.eos_token_id in ids[-2:]:
        return _document(ids, trained)
    return _ended(ids, trained, tokenizer, trained_end=messages[-1]["role"] == "assistant")


def _generation_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and what the template itself marks as the assistant's."""
    # `apply_chat_template(return_assistant_tokens_mask=True)` marks the whole rest of a conversation when
    # a span ends in a character without a token (transformers 5.23), so only its renderer is used.
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], spans[0]


def _assistant_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and from where to where in it the assistant speaks (characters)."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or index == 0:  # an opening line answers nothing
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{where}: the chat template renders turn {index + 1} differently within the conversation, "
                "so its tokens cannot be told; use a template with {% generation %} marks, or one answer "
                "per conversation"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _marked(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[bool]]:
    """Ids of `text`, and whether each token begins inside one of `spans` (characters, end excluded)."""
    if not tokenizer.is_fast:
        raise DataError("prompts and conversations need a fast tokenizer (tokenizer.json), to tell tokens by place")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    inside = np.zeros(len(starts), dtype=bool)
    for start, stop in spans:
        inside |= (starts >= start) & (starts < stop)
    return encoded["input_ids"], inside.tolist()


def _ended(
    ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase, *, trained_end: bool = True
) -> Document:
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] == end):
        return _document(ids, trained)
    return _document([*ids, end], [*trained, trained_end])


def _document(ids: list[int], trained: list[bool]) -> Document:
    return Document(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))
