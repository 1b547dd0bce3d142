"""A document has one start token and one end token, whoever writes them: tokenizer, template or the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kd_plugin.data.encoding import prompt_ids
from tests.chat_data import CHAT, CONVERSATION, WORDS, make_tokenizer, read, shown, write_jsonl

WITH_START = "{{ '<bos> ' }}" + CHAT


def tokenizer_that_adds(before: str = "", after: str = "", template: str | None = None) -> Any:
    from tokenizers import processors

    tokenizer = make_tokenizer(template)
    words = [word for word in (*before.split(), *after.split())]
    pairs = [(word, WORDS.index(word)) for word in words]
    single = " ".join(part for part in (before, "$A", after) if part)
    if words:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer


ADDED = [("", ""), ("<bos>", ""), ("", "<eos>"), ("<bos>", "<eos>")]


@pytest.mark.parametrize(("before", "after"), ADDED)
def test_text_rendered_with_a_template_is_read_as_it_stands(tmp_path: Path, before: str, after: str) -> None:
    tokenizer = tokenizer_that_adds(before, after, WITH_START)
    text = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [WORDS[index] for index in wanted] == "<bos> user : hi <eos> assistant : yes <eos>".split()
    (tmp_path / "x.txt").write_text(text)
    sources = [str(tmp_path / "x.txt"), write_jsonl(tmp_path / "x.jsonl", {"text": text})]
    cut = text.index("yes")
    sources.append(write_jsonl(tmp_path / "y.jsonl", {"prompt": text[:cut], "completion": text[cut:]}))
    sources.append(write_jsonl(tmp_path / "z.jsonl", {"messages": CONVERSATION[:2]}))
    for source in sources:
        (document,) = read(source, tokenizer)
        assert document.input_ids.tolist() == wanted, source
    assert shown(read(sources[2], tokenizer)[0]) == "<bos> user : hi <eos> assistant : YES <EOS>"
    assert prompt_ids(tokenizer, text[:cut]) == wanted[:-2]


@pytest.mark.parametrize(("before", "after"), ADDED)
def test_other_text_gets_what_the_tokenizer_adds_and_an_end(tmp_path: Path, before: str, after: str) -> None:
    tokenizer = tokenizer_that_adds(before, after)
    wanted = f"{before} a b <eos>".split()
    texts = write_jsonl(tmp_path / "x.jsonl", {"text": "a b"}, {"text": "a b <eos>"})
    prompts = write_jsonl(
        tmp_path / "y.jsonl", {"prompt": "a ", "completion": "b"}, {"prompt": "", "completion": "a b"}
    )
    for source in (texts, prompts):
        for document in read(source, tokenizer):
            assert [WORDS[index] for index in document.input_ids] == wanted
            assert document.trained[-2:].all()
    assert [WORDS[index] for index in prompt_ids(tokenizer, "a b")] == wanted[:-1]


def test_several_tokens_at_the_start_are_not_doubled_either(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_adds("c <bos>")  # as GLM's [gMASK] <sop>
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "c <bos> a"}, {"text": "c a"}, {"text": "<bos> a"})
    assert [shown(document) for document in read(source, tokenizer)] == [
        "C <BOS> A <EOS>",
        "C <BOS> C A <EOS>",
        "C <BOS> <BOS> A <EOS>",
    ]


def test_a_start_token_that_nobody_adds_stays_as_it_is_written(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "<bos> <bos> a"}, {"text": "<bos> a"})
    assert [shown(document) for document in read(source)] == ["<BOS> <BOS> A <EOS>", "<BOS> A <EOS>"]


@pytest.mark.parametrize("after", ["", "<eos>"])
def test_an_end_token_is_seen_behind_a_template_s_last_white_space(tmp_path: Path, after: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tokenizer_that_adds("<bos>", after)
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" |(?=\n)"), "removed")
    texts = ["a <eos>\n", "a <eos> b c", "a\n", "<eos> \n"]
    rows = [*({"text": text} for text in texts), {"prompt": "a ", "completion": "b <eos>\n"}]
    found = [shown(document) for document in read(write_jsonl(tmp_path / "x.jsonl", *rows), tokenizer)]
    assert found == [
        "<BOS> A <EOS> <UNK>",
        "<BOS> A <EOS> B C <EOS>",
        "<BOS> A <UNK> <EOS>",
        "<BOS> <EOS> <UNK>",
        "<bos> a B <EOS> <UNK>",
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b", encoding="utf-8-sig")
    assert shown(read(tmp_path / "x.txt")[0]) == "A B <EOS>"
