"""An index of documents: the same sequences, splits and mixtures as of documents that are all in memory."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest

from kd_plugin.data import best_fit as best_fit_module
from kd_plugin.data import corpus as corpus_module
from kd_plugin.data.best_fit import best_fit
from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.documents import split_documents
from kd_plugin.data.isolated import IsolatedDataset
from kd_plugin.data.known_ids import VocabularyError, check_ids
from kd_plugin.data.mixture import Part, mixed, without
from kd_plugin.data.packing import PackedDataset

IGNORED = -100


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few documents lie in several blocks, and a long one in a block of its own."""
    monkeypatch.setattr(corpus_module, "_BLOCK_TOKENS", 40)
    monkeypatch.setattr(corpus_module, "_BLOCK_DOCUMENTS", 5)
    monkeypatch.setattr(best_fit_module, "_AT_ONCE", 7)


def made(number: int, seed: int = 0, *, longest: int = 23, ids: int = 50) -> list[Document]:
    """Documents of odd lengths, some trained on in part, some copies of others."""
    draw = np.random.default_rng(seed)
    documents = []
    for index in range(number):
        length = int(draw.integers(1, longest))
        trained = draw.random(length) < draw.choice([0.1, 0.5, 1.0])
        documents.append(Document(draw.integers(ids, size=length).astype(np.int32), trained, f"x:{index}"))
    return [*documents, *documents[: number // 5]]


def content(documents: Corpus | list[Document]) -> list[tuple[list[int], list[bool], str]]:
    return [(ids.tolist(), trained.tolist(), where) for ids, trained, where, _ in documents]


def test_a_corpus_is_the_documents_it_is_made_of() -> None:
    documents = made(60)
    corpus = Corpus.of(iter(documents))
    assert content(corpus) == content(documents) and len(corpus._blocks) > 10
    assert content(corpus[3:40:7]) == content(documents[3:40:7])
    assert content([corpus[-1]]) == content(documents[-1:])
    with pytest.raises(IndexError):
        corpus[len(documents)]
    places = np.array([5, 5, 0, 71])
    both = Corpus.joined([corpus.chosen(places), Corpus.of(made(9, 1))])
    assert content(both) == content([*(documents[place] for place in places), *made(9, 1)])
    assert both.lengths.tolist() == [len(document.input_ids) for document in both]
    assert both.num_tokens == sum(both.lengths)
    assert content(Corpus.of([])) == []


def test_the_index_says_what_is_in_the_documents() -> None:
    documents = [*made(60), Document(np.array([7, 3], np.int32), np.zeros(2, bool))]
    corpus = Corpus.of(documents)
    for name, values in {
        "digest": [int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big") for ids, *_ in documents],
        "num_trained": [trained.sum() for _, trained, *_ in documents],
        "last_trained": [max(np.flatnonzero(trained), default=-1) for _, trained, *_ in documents],
        "highest": [ids.max() for ids, *_ in documents],
    }.items():
        assert corpus.column(name).tolist() == values


def test_a_long_document_is_not_copied() -> None:
    long = Document(np.arange(1000, dtype=np.int32), np.ones(1000, bool))
    [alone] = Corpus.of([long])
    assert np.shares_memory(alone.input_ids, long.input_ids)
    (train,), (held_out,) = split_documents([long], 0.1)
    assert np.shares_memory(train.input_ids, long.input_ids) and np.shares_memory(held_out.trained, long.trained)


# Packing, against all tokens in one array


def laid_out(documents: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and targets of all tokens, and where each document begins."""
    lengths = [len(document.input_ids) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    targets = np.concatenate([document.trained for document in documents])
    targets[starts] = False
    return np.concatenate([document.input_ids for document in documents]), targets, starts


@pytest.mark.parametrize("seq_len", [2, 7, 50])
def test_joined_sequences_are_cut_out_of_all_tokens(seq_len: int) -> None:
    documents = made(60)
    ids, targets, _ = laid_out(documents)
    dataset = PackedDataset(Corpus.of(documents), seq_len, keep_tail=True)
    assert len(dataset) == -(-len(ids) // seq_len)
    labels = np.where(targets, ids, IGNORED)
    for index in range(len(dataset)):
        part = slice(index * seq_len, (index + 1) * seq_len)
        item, padding = dataset[index], dataset.num_padding(index)
        assert item["input_ids"].tolist() == [*ids[part], *[0] * padding]
        assert item["labels"].tolist() == [*labels[part], *[IGNORED] * padding]
        assert item["input_ids"].dtype == item["labels"].dtype == np.int64


def bins_of(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best fit with a list for every bin."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(rooms, lengths[piece])
        if at == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        bins[chosen].append(piece)
        if left := room - int(lengths[piece]):
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


@pytest.mark.parametrize("number", [0, 1, 7, 300])
def test_bins_are_those_of_lists(number: int) -> None:
    lengths = np.random.default_rng(2).integers(1, 18, number)
    assert [each.tolist() for each in best_fit(lengths, 17)] == bins_of(lengths, 17)


@pytest.mark.parametrize("seq_len", [2, 7, 50])
@pytest.mark.parametrize("seed", [0, 3])
def test_isolated_sequences_are_those_of_all_tokens(seq_len: int, seed: int) -> None:
    documents = made(60)
    ids, targets, starts = laid_out(documents)
    ends = np.append(starts[1:], len(ids))
    bounds = [(at, min(at + seq_len, b)) for a, b in zip(starts, ends, strict=True) for at in range(a, b, seq_len)]
    targets[[a for a, _ in bounds]] = False
    counted = np.array([targets[a:b].any() for a, b in bounds])
    order = np.random.default_rng(seed).permutation(np.flatnonzero(counted))
    bins = bins_of(np.array([bounds[piece][1] - bounds[piece][0] for piece in order]), seq_len)
    dataset = IsolatedDataset(Corpus.of(documents), seq_len, seed=seed, keep_tail=True)
    assert dataset.num_left_out == sum(b - a for (a, b), kept in zip(bounds, counted, strict=True) if not kept)
    assert len(dataset) == len(bins)
    for index, pieces in enumerate(bins):
        item, places = dataset[index], [bounds[order[piece]] for piece in pieces]
        padding = seq_len - sum(b - a for a, b in places)
        assert item["input_ids"].tolist() == [*itertools.chain(*(ids[a:b] for a, b in places)), *[0] * padding]
        labels = [where for a, b in places for where in np.where(targets[a:b], ids[a:b], IGNORED)]
        assert item["labels"].tolist() == [*labels, *[IGNORED] * padding]
        positions = [at for length in (*(b - a for a, b in places), padding) for at in range(length)]
        assert item["position_ids"].tolist() == positions and dataset.num_padding(index) == padding


def test_any_stretch_of_all_tokens_can_be_read() -> None:
    documents = made(30)
    ids, targets, starts = laid_out(documents)
    dataset = PackedDataset(documents, 4)
    for first, stop in itertools.combinations(range(0, len(ids) + 1, 3), 2):
        found, marks = dataset.read(first, stop)
        assert np.array_equal(found, ids[first:stop]) and np.array_equal(marks, targets[first:stop])
    for index in range(len(ids)):
        document = int(np.flatnonzero(starts <= index)[-1])
        wanted = f"document {document + 1} ({documents[document].where}), token {index - starts[document] + 1}"
        assert dataset.place(index) == wanted
    # Marks of mapped files are read-only, and those of documents in memory stay as they are.
    assert content(dataset.documents) == content(made(30))


# Holding out and mixing, against digests in sets


def hash_of(document: Document) -> bytes:
    return hashlib.sha256(document.input_ids.tobytes()).digest()


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.8])
def test_held_out_are_the_first_by_digest_until_they_are_enough(fraction: float) -> None:
    documents = made(60)
    copies = Counter(map(hash_of, documents))
    chosen: set[bytes] = set()
    for digest in sorted(copies):
        if sum(copies[taken] for taken in chosen) >= max(1, round(len(documents) * fraction)):
            break
        chosen.add(digest)
    train, held_out = split_documents(documents, fraction)
    assert content(train) == content([each for each in documents if hash_of(each) not in chosen])
    assert content(held_out) == content([each for each in documents if hash_of(each) in chosen])


def placed(documents: list[Document], tokens: float) -> list[tuple[float, Document]]:
    found: list[tuple[float, Document]] = []
    size = 0
    for number, document in enumerate(itertools.chain(documents, itertools.cycle(sorted(documents, key=hash_of)))):
        middle = size + len(document.input_ids) / 2
        if number >= len(documents) and middle > tokens:
            break
        found.append((middle / tokens, document))
        size += len(document.input_ids)
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, 5.0, 2.0)])
def test_a_mixture_has_each_document_where_its_share_says(weights: tuple[float, ...]) -> None:
    groups = [made(40, 1), made(7, 2), made(33, 3)]
    parts = [Part(str(index), weight, group) for index, (weight, group) in enumerate(zip(weights, groups, strict=True))]
    sizes = [sum(len(document.input_ids) for document in group) for group in groups]
    per_weight = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    wanted = [
        (place, number, document)
        for number, (group, weight) in enumerate(zip(groups, weights, strict=True))
        for place, document in placed(group, weight * per_weight)
    ]
    wanted.sort(key=lambda item: item[:2])
    assert content(mixed(parts)) == content([document for _, _, document in wanted])


def test_copies_of_what_is_held_out_are_taken_out_of_every_part() -> None:
    one, two = made(20, 1), made(20, 2)
    held_out = [one[3], two[4]]
    parts = without([Part("a", 1.0, [*one, two[4]]), Part("b", 1.0, Corpus.of([*two, one[3]]))], held_out)
    chosen = {hash_of(document) for document in held_out}
    for part, group in zip(parts, (one, two), strict=True):
        assert content(list(part.documents)) == content([each for each in group if hash_of(each) not in chosen])


def test_unknown_ids_are_counted_over_all_documents_and_named_by_the_first() -> None:
    documents = made(60)
    dataset = PackedDataset(documents, 8)
    ids, _, _ = laid_out(documents)
    with pytest.raises(VocabularyError) as caught:
        parts, embedded = dataset.with_ids_from(40), {"student": 48, "teacher": 40, "other": 50}
        check_ids(parts, embedded, where=dataset.place, token=str, what="data")
    lines = str(caught.value).splitlines()
    for line, size in zip(lines, (48, 40), strict=True):
        first = int(np.flatnonzero(ids >= size)[0])
        assert f"data: {dataset.place(first)} is id {ids[first]} " in line
        assert f"({np.count_nonzero(ids >= size)} such token(s) in all)" in line
