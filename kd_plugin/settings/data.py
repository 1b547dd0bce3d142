# pyright: strict
"""Settings of the text that is read; nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.functional_validators import model_validator

from kd_plugin.settings.distill import Positive, Section

__all__ = ["DataConfig", "WeightedSource"]

ColumnName = Literal[
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
    "role",
    "content",
]


class WeightedSource(Section):
    """One of several sources of training text; what is null is as in `data`."""

    source: Annotated[str, Field(min_length=1)]
    """As `data.train`."""

    weight: Positive = 1.0
    """Its share of the training tokens is this, divided by the sum over sources. Every document is read, and those of
    a source with too few tokens for its share are repeated."""

    subset: str | None = None
    """As `data.subset`."""

    split: str | None = None
    """As `data.split`."""

    text_column: str | None = None
    """As `data.text_column`."""

    columns: dict[ColumnName, Annotated[str, Field(min_length=1)]] | None = None
    """As `data.columns`."""


class DataConfig(Section):
    """Text that both models read."""

    train: Annotated[str, Field(min_length=1)] | tuple[WeightedSource, ...] = "python_docs"
    """`python_docs` (built in); a .txt, .jsonl, .json, .csv, .tsv or .parquet file (all but Parquet also as .gz), a
    directory or glob of them; a folder of `save_to_disk`; or a dataset name. Several: [{source: a.jsonl, weight: 2},
    {source: b.jsonl}], where weight (1) over their sum is a source's share of the training tokens, and `subset`,
    `split`, `text_column` and `columns` may be its own; every document is read, and those of sources with too few
    tokens are repeated. A .txt file is one document; rows have `text`, `prompt` and `completion` (texts or turns),
    `messages` or ShareGPT's `conversations` (and `tools`, `documents`, `chat_template_kwargs`, if the chat template
    knows them), or Alpaca's `instruction`, `input` and `output`."""

    eval: str | None = None
    """Held-out text in the same forms; null holds out `eval_fraction` of the training documents."""

    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training documents that is held out when `eval` is null; a single document is cut."""

    subset: str | None = None
    """Configuration name of a hub dataset."""

    split: str = "train"
    """Split of a hub dataset used for training."""

    eval_split: str | None = None
    """Split of a hub dataset used for evaluation; null falls back to `eval_fraction`."""

    text_column: str = "text"
    """Column with plain text, where the data has one; one that is named goes before all other columns."""

    columns: dict[ColumnName, Annotated[str, Field(min_length=1)]] = Field(default={})
    """Names that the data has for ours: {messages: dialog, role: speaker, content: utterance}, or {prompt: question,
    completion: answer}. `role` and `content` are keys of a turn. A name that no row has is an error."""

    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a conversation are trained on: all, or its last one only."""

    seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens per packed sequence."""

    packing: Literal["isolated", "joined"] = "isolated"
    """`isolated`: documents share a sequence and do not read each other, neither in the teacher nor in the student:
    positions start anew and attention stays within each, which is tried out on both models at the start. Documents
    that fit stay whole. `joined`: documents are laid end to end, each reads what stands before it, and a sequence
    ends wherever it is full; for models that cannot keep documents apart, such as state-space models."""

    max_documents: PositiveInt | None = None
    """Use only the first so many documents (of each source of `train`, and of `eval`)."""

    streaming: bool = False
    """Read datasets of the hub while they are tokenised, instead of downloading them first: only their tokens are kept
    on disk, 5 bytes each. `max_documents` does so by itself. Files are always read so, in bounded memory."""

    cache: str | None = "auto"
    """Folder for tokenised text, which the ranks of a machine and later starts share; it may be deleted at any time.
    `auto`: `tokenized` in `$KD_PLUGIN_CACHE`, or in `kd_plugin` of the user's cache. Text is tokenised into it in
    bounded memory, and sequences are read from it, so that neither has to fit into memory. null: each process
    tokenises, and holds all tokens in memory."""

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        if not self.train:
            raise ValueError("train is an empty list: name a source as in [{source: a.jsonl, weight: 1}]")
        for name, _, config in self.sources():
            if "text" in config.columns and config.text_column != "text":
                raise ValueError(f"{name}: text_column and columns.text both name the column of plain text: keep one")
        return self

    def sources(self) -> list[tuple[str, WeightedSource, DataConfig]]:
        """Each source of training text: the setting that names it, the source, and how it is read.

        The settings of the last have it as their only `train`.
        """
        if isinstance(self.train, str):
            return [("data.train", WeightedSource(source=self.train), self)]
        own = ("subset", "split", "text_column", "columns")
        found: list[tuple[str, WeightedSource, DataConfig]] = []
        for index, source in enumerate(self.train):
            given = {key: value for key in own if (value := getattr(source, key)) is not None}
            config = self.model_copy(update={"train": source.source, **given})
            found.append((f"data.train[{index}]", source, config))
        return found
