"""Documents: what is read, tokenised and held out, and the sequences made of it.

Notable decisions:
- held-out documents are chosen by their content, so that copies of one document are never on both sides and
  neither seed nor order matters. A single document is cut in two instead;
- text passes record by record into the tokenised cache (`data.tokenized_cache`), and what is handed on is an index of
  it (`data.corpus`): memory is bounded, whatever the size of the text.
How text becomes token ids is in `data.encoding`; packing and batches are in `data.packing` and `data.isolated`, whose
names are offered here too.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd_plugin.data.columns import RowReader
from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.encoding import encode, prompt_ids
from kd_plugin.data.isolated import pack
from kd_plugin.data.known_ids import check_ids
from kd_plugin.data.mixture import Part, mixed, without
from kd_plugin.data.packing import Batch, PackedDataset, Sequences, TrainBatches, collate, eval_batches
from kd_plugin.data.paired import PairedDataset
from kd_plugin.data.record import DataError
from kd_plugin.data.records import open_source, refuse_unused
from kd_plugin.data.tally import Tally
from kd_plugin.data.teacher_text import TeacherReader
from kd_plugin.data.tokenized_cache import cached_documents
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
    "eval_batches",
    "load_datasets",
    "load_documents",
    "split_documents",
]

logger = logging.getLogger(__name__)


def load_documents(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, teacher: TeacherReader | None = None
) -> tuple[Corpus, Corpus]:
    """Load training and held-out documents, the same on every rank.

    With `teacher` each has what the teacher reads of it.

    Raises:
        DataError: nothing found, no accepted columns, nothing to train on, or a setting without effect.
    """
    refuse_unused(config)
    parts = [
        Part(name, source.weight, _read(source.source, read, tokenizer, teacher, name=name, split=read.split))
        for name, source, read in config.sources()
    ]
    if config.eval is not None:
        split = config.eval_split or config.split
        return mixed(parts), _read(config.eval, config, tokenizer, teacher, name="data.eval", split=split)
    if (split := config.eval_split) is not None:
        name, sources = "data.eval_split", config.sources()
        held_out = [_read(s.source, read, tokenizer, teacher, name=name, split=split) for _, s, read in sources]
        return mixed(parts), Corpus.joined(held_out)
    split_parts = [split_documents(part.documents, config.eval_fraction) for part in parts]
    held_out = Corpus.joined([chosen for _, chosen in split_parts])
    kept = without([Part(*p[:2], rest) for p, (rest, _) in zip(parts, split_parts, strict=True)], held_out)
    left = sum(len(part.documents) for part in kept)
    logger.info("data.eval_fraction: %d document(s) held out, %d left to train on", len(held_out), left)
    return mixed(kept), held_out


def load_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ignore_index: int,
    *,
    seed: int,
    soft_on_all: bool = False,
    teacher: TeacherReader | None = None,
) -> tuple[Sequences, Sequences]:
    """Load training and held-out sequences of `config.seq_len` tokens, packed as `config.packing` says.

    `seed` shuffles the training documents before they are packed, where that is by fit; with `soft_on_all` the soft
    loss counts on every token. `teacher` makes the teacher's text, where that is another.

    Raises:
        DataError: the documents cannot be loaded, or fill no sequence.
    """
    train, held_out = load_documents(config, tokenizer, teacher)
    pair = ((train, False), (held_out, True))
    one, other = (
        pack(documents, config, ignore_index, seed=seed, keep_tail=tail, soft_on_all=soft_on_all)
        for documents, tail in pair
    )
    return one, other


def check_all_ids(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    datasets: tuple[Sequences, Sequences],
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
    check_ids([(0, prompt)], embedded, where=lambda index: f"token {index + 1}", token=token, what="log.sample_prompt")
    readers = {role: rows for role, rows in embedded.items() if role == "student" or config.distill.soft_weight}
    for name, dataset in zip(("training", "held-out"), datasets, strict=True):
        parts = dataset.with_ids_from(min(readers.values()))
        check_ids(parts, readers, where=dataset.place, token=token, what=f"{name} data")
        if isinstance(dataset, PairedDataset) and "teacher" in readers:
            theirs, what = {"teacher": readers["teacher"]}, f"{name} data as the teacher reads it"
            check_ids(dataset.teacher_ids(), theirs, where=dataset.teacher_place, token=token, what=what)


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[Corpus, Corpus]:
    """Hold out about `fraction` of the documents (one at least); returns (training, held out).

    Raises:
        DataError: nothing would be left to train on.
    """
    corpus = Corpus.of(documents)
    if len(corpus) == 1:
        return _cut_in_two(corpus[0], fraction)
    digests, wanted = corpus.column("digest"), max(1, round(len(corpus) * fraction))
    # In the order of their digests until they are enough; copies have the same.
    held_out = digests <= np.partition(digests, wanted - 1)[wanted - 1]
    if held_out.all():
        different = len(np.unique(digests))
        lower = "lower it, or " if different > 1 else ""
        raise DataError(
            f"data.eval_fraction {fraction} of {len(corpus)} documents ({different} different) leaves "
            f"nothing to train on; {lower}name held-out text with data.eval"
        )
    return corpus.chosen(np.flatnonzero(~held_out)), corpus.chosen(np.flatnonzero(held_out))


def _read(
    source: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: TeacherReader | None,
    *,
    name: str,
    split: str,
) -> Corpus:
    if teacher is not None and config.cache is not None:
        logger.info("data.cache: %s is tokenised by every process: the cache has no room for teacher.input", name)
        config = config.model_copy(update={"cache": None})
    opened = open_source(source, config, name=name, split=split)

    def tokenised(tally: Tally) -> Iterator[Document]:
        rows = RowReader(config)
        records = itertools.islice(opened.records(rows), config.max_documents)
        shown = bar(records, what=f"{name}, tokenising", unit="document", total=config.max_documents)
        yield from tally.kept(encode(tally.counted(shown), tokenizer, teacher))
        rows.check_all_found(name)

    documents, tally = cached_documents(tokenised, opened, config, tokenizer, name)
    tally.report(name, source, documents)
    if tokenizer.eos_token_id is None:
        logger.warning("%s: the tokenizer has no end token, so documents end without one", name)
    return documents


def _cut_in_two(document: Document, fraction: float) -> tuple[Corpus, Corpus]:
    ids, trained, where, teacher = document
    if teacher is not None:
        raise DataError("one conversation cannot be cut in two; name held-out text with data.eval")
    cut = len(ids) - max(1, round(len(ids) * fraction))
    if cut < 1:
        raise DataError(f"one document of {len(ids)} token(s) cannot be cut in two; name held-out text with data.eval")
    rest = len(ids) - cut
    logger.info("data.eval_fraction: the last %d of the only document's %d tokens are held out", rest, len(ids))
    halves = (Document(ids[:cut], trained[:cut], where), Document(ids[cut:], trained[cut:], where))
    return Corpus.of(halves[:1]), Corpus.of(halves[1:])
