"""Documents: text to token ids, with a mark on every token that is trained on.

Notable decisions:
- plain text is trained on whole; of a prompt with completion only the completion, of a conversation only what
  the assistant says. What else a row may hold is in `data.columns`, how it is rendered in `data.conversations`;
- a document begins with the tokenizer's start token where the tokenizer adds one, and once: text that was rendered
  with a chat template has it already. Conversations begin as their template has it;
- each document ends with the tokenizer's end token, once, so that a model learns to stop;
- held-out documents are chosen by their content, so that copies of one document are never on both sides and
  neither seed nor order matters. A single document is cut in two instead.
Packing and batches are in `data.packing`, whose names are offered here too.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kd_plugin.data.conversations import Spans, render
from kd_plugin.data.known_ids import check_ids
from kd_plugin.data.packing import Batch, Document, PackedDataset, TrainBatches, collate, eval_batches, indices_for_step
from kd_plugin.data.record import DataError, Record
from kd_plugin.data.records import read_records, refuse_unused
from kd_plugin.distributed.bars import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from kd_plugin.settings.run import DataConfig, RunConfig

__all__ = [
    "Batch",
    "DataError",
    "PackedDataset",
    "TrainBatches",
    "check_all_ids",
    "collate",
    "encode",
    "eval_batches",
    "indices_for_step",
    "load_datasets",
    "load_documents",
    "prompt_ids",
    "split_documents",
]

logger = logging.getLogger(__name__)

_TEXTS_PER_CALL = 256  # fast tokenizers work on the texts of one call in parallel
_AFTER_THE_END = 4  # tokens: the end token, what a template leaves behind it, what a tokenizer adds


def load_documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Document], list[Document]]:
    """Load training and held-out documents, the same on every rank.

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
    """Load training and held-out sequences of `config.seq_len` tokens.

    Raises:
        DataError: the documents cannot be loaded, or fill no sequence.
    """
    train, held_out = load_documents(config, tokenizer)
    return (
        PackedDataset(train, config.seq_len, ignore_index),
        PackedDataset(held_out, config.seq_len, ignore_index, keep_tail=True),
    )


def check_all_ids(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    datasets: tuple[PackedDataset, PackedDataset],
    embedded: Mapping[str, int],
) -> None:
    """Refuse ids that a model will be given and cannot embed; without a soft loss the teacher reads the prompt only.

    Args:
        config: the run.
        tokenizer: names the tokens in errors.
        datasets: training and held-out sequences.
        embedded: "student", "teacher" -> the number of ids that it embeds.

    Raises:
        VocabularyError: an id that one of them does not embed; the message has its document and place.
    """
    token = tokenizer.convert_ids_to_tokens
    prompt = np.array(prompt_ids(tokenizer, config.log.sample_prompt or ""), dtype=np.int64)
    check_ids(prompt, embedded, where=lambda index: f"token {index + 1}", token=token, what="log.sample_prompt")
    readers = {role: rows for role, rows in embedded.items() if role == "student" or config.distill.soft_weight}
    for name, dataset in zip(("training", "held-out"), datasets, strict=True):
        check_ids(dataset.input_ids, readers, where=dataset.place, token=token, what=f"{name} data")


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out about `fraction` of the documents (one at least); returns (training, held out).

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(documents) == 1:
        return _cut_in_two(documents[0], fraction)
    digests = [hashlib.sha256(document.input_ids.tobytes()).digest() for document in documents]
    copies = Counter(digests)
    chosen = _chosen(copies, max(1, round(len(documents) * fraction)))
    train = [document for document, digest in zip(documents, digests, strict=True) if digest not in chosen]
    held_out = [document for document, digest in zip(documents, digests, strict=True) if digest in chosen]
    if not train:
        lower = "lower it, or " if len(copies) > 1 else ""
        raise DataError(
            f"data.eval_fraction {fraction} of {len(documents)} documents ({len(copies)} different) leaves "
            f"nothing to train on; {lower}name held-out text with data.eval"
        )
    return train, held_out


def _chosen(copies: Counter[bytes], wanted: int) -> set[bytes]:
    """Digests, in their order, until their documents (copies counted) are `wanted` or more."""
    chosen: set[bytes] = set()
    for digest in sorted(copies):
        if sum(copies[taken] for taken in chosen) >= wanted:
            break
        chosen.add(digest)
    return chosen


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document | None]:
    """Tokenise records in order; a record that holds nothing to train on gives None.

    Raises:
        DataError: a conversation that the chat template cannot render, or renders unlike its beginning.
    """
    records, added = iter(records), added_tokens(tokenizer)
    while group := list(itertools.islice(records, _TEXTS_PER_CALL)):
        texts = [record.values["text"] for record in group if record.form == "text"]
        # An empty list is refused by tokenizers.
        encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        for record in group:
            if record.form == "text":
                document = _plain(record, next(encoded), tokenizer, added)
            elif record.form == "messages":
                document = _conversation(record, tokenizer)
            else:
                document = _completion(record, tokenizer, added)
            yield document if document is not None and document.trained.any() else None


def _read(
    source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, name: str, split: str
) -> list[Document]:
    forms: Counter[str] = Counter()

    def counted() -> Iterator[Record]:
        records = read_records(source, config, name=name, split=split)
        wanted = itertools.islice(records, config.max_documents)
        for record in bar(wanted, what=f"{name}, tokenising", unit="document", total=config.max_documents):
            forms[record.form] += 1
            yield record

    documents = [document for document in encode(counted(), tokenizer) if document is not None]
    if not documents:
        raise DataError(f"{name}: {source} has no text to train on ({sum(forms.values())} records read)")
    by_form = ", ".join(f"{count} x {form}" for form, count in forms.items())
    num_tokens = sum(len(document.input_ids) for document in documents)
    logger.info("%s: %s in %s; %d documents, %d tokens", name, by_form, source, len(documents), num_tokens)
    if skipped := sum(forms.values()) - len(documents):
        logger.warning("%s: %d record(s) without a token to train on were left out", name, skipped)
    if tokenizer.eos_token_id is None:
        logger.warning("%s: the tokenizer has no end token, so documents end without one", name)
    return documents


def _cut_in_two(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    ids, trained, where = document
    cut = len(ids) - max(1, round(len(ids) * fraction))
    if cut < 1:
        raise DataError(f"one document of {len(ids)} token(s) cannot be cut in two; name held-out text with data.eval")
    rest = len(ids) - cut
    logger.info("data.eval_fraction: the last %d of the only document's %d tokens are held out", rest, len(ids))
    return [Document(ids[:cut], trained[:cut], where)], [Document(ids[cut:], trained[cut:], where)]


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


def _conversation(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document | None:
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
