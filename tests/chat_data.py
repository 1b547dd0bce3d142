"""Conversations in a few words, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.documents import DataError, load_documents
from kd_plugin.settings.run import DataConfig

WORDS = "<unk> <eos> <bos> : user assistant system hi yes no why because a b c d e f g".split()


CHAT = (
    "{% for message in messages %}{{ message.role + ' : ' + message.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


MARKED_CHAT = (
    "{% for message in messages %}{{ message.role + ' : ' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ message.content + ' <eos> ' }}{% endif %}{% endfor %}"
)


def make_tokenizer(chat_template: str | None = None, *, bos: bool = False, eos: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"eos_token": "<eos>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: Any, tokenizer: Any = None, **values: Any) -> Corpus:
    """Training documents of `source`, which is also named as evaluation data so that none are held out."""
    config = DataConfig(**{"train": str(source), "eval": str(source), **values})
    return load_documents(config, tokenizer or make_tokenizer())[0]


def shown(document: Document) -> str:
    """The document in words, those trained on in upper case."""
    words = [WORDS[index] for index in document.input_ids]
    return " ".join(w.upper() if t else w for w, t in zip(words, document.trained, strict=True))


CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because a"},
]


TOOLS = [{"type": "function", "function": {"name": "g", "parameters": {"c": None, "enum": ["a", None]}}}]
FULL = (
    "{% if tools %}{{ 'a ' + tools[0].function.name + ' ' + tools | tojson + ' ' }}{% endif %}"
    "{% if documents %}{{ 'b ' + documents[0].text + ' ' }}{% endif %}"
    "{% if thoughtful is defined and not thoughtful %}{{ 'no ' }}{% endif %}"
    "{% for message in messages %}{{ message.role + ' : ' }}"
    "{% if message.tool_calls %}{{ 'd ' + message.tool_calls[0].function.name + ' <eos> ' }}"
    "{% else %}{{ message.content + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
CHAT_OF_ONE = CONVERSATION[:2]
ANSWERED = "user : hi <eos> assistant : YES <EOS>"


def documents(tmp_path: Path, *rows: Any, template: str | None = FULL, **values: Any) -> Corpus:
    return read(write_jsonl(tmp_path / "x.jsonl", *rows), make_tokenizer(template), **values)


def rendered(tmp_path: Path, row: dict[str, Any], template: str = FULL) -> str:
    return shown(documents(tmp_path, row, template=template)[0])


def refusal(tmp_path: Path, *rows: Any, **values: Any) -> str:
    """What is said, after the place of the last row."""
    with pytest.raises(DataError) as caught:
        documents(tmp_path, *rows, **values)
    place, said = f"{tmp_path}/x.jsonl:{len(rows)}", str(caught.value)
    assert said.startswith(place) and "\n" not in said
    return said.removeprefix(place)
