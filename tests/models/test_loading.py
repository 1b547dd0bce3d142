"""Model sources, tokenizers, positions: tiny random models, no network."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from kd_plugin.models.loading import (
    ModelError,
    build_student,
    check_positions,
    load_teacher,
    load_tokenizer,
    progress_bars,
    resolve_source,
)
from kd_plugin.plugin.tokenizers import TokenizerMismatch, check_tokenizers, check_vocabulary
from kd_plugin.settings.run import StudentConfig, TeacherConfig
from tests.six_layer_models import make_teacher, tokens
from tests.tiny_models import make_model

transformers = pytest.importorskip("transformers")


def test_teacher_is_frozen_and_in_the_precision_asked_for(tmp_path: Path) -> None:
    make_teacher("qwen3").save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(model=str(tmp_path), dtype="bfloat16", attn_implementation="eager"))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert teacher.config._attn_implementation == "eager"
    student = build_student(StudentConfig(model=str(tmp_path)), teacher, seed=0)
    assert student.training and {p.dtype for p in student.parameters()} == {torch.float32}
    fresh = build_student(StudentConfig(model=str(tmp_path), from_config={"hidden_size": 32}), teacher, seed=0)
    assert fresh.config.hidden_size == 32 and fresh.config.num_hidden_layers == 6


def test_pickled_weights_need_permission(tmp_path: Path) -> None:
    model = make_teacher("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\.bin weights only.*teacher\.allow_pickle=true"):
        load_teacher(TeacherConfig(model=str(tmp_path)))
    loaded = load_teacher(TeacherConfig(model=str(tmp_path), allow_pickle=True, dtype="float32"))
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "some_model") -> Path:
    """A package whose import fails, so that finding it by importing would be noticed."""
    (folder / name / "weights").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))
    return folder / name


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path, monkeypatch)
    (package / "weights" / "a.gguf").touch()
    found = resolve_source(TeacherConfig(model="package:some_model"))
    assert found == (str(package / "weights"), "a.gguf")
    assert resolve_source(TeacherConfig(model="package:some_model.weights")) == found
    assert resolve_source(TeacherConfig(model="package:some_model", gguf_file="weights/a.gguf")) == (
        str(package), "weights/a.gguf",
    )  # fmt: skip
    assert "some_model" not in sys.modules
    (package / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"2 GGUF files in .*: a\.gguf, b\.gguf; choose one with gguf_file"):
        resolve_source(TeacherConfig(model="package:some_model"))
    (package / "config.json").touch()
    assert resolve_source(TeacherConfig(model="package:some_model")) == (str(package), None)


def test_local_and_hub_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    assert resolve_source(TeacherConfig(model=str(tmp_path / "x.gguf"))) == (str(tmp_path), "x.gguf")
    assert resolve_source(TeacherConfig(model=str(tmp_path))) == (str(tmp_path), "x.gguf")
    assert resolve_source(TeacherConfig(model="some/model")) == ("some/model", None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "package:no_such_package"}, "teacher.model: no installed package 'no_such_package'"),
        ({"model": "package:this"}, "'this' is a single module"),
        ({"model": "package:email.nothing"}, "package 'email' has no folder 'nothing'"),
        ({"model": "./no/such/folder"}, "no such directory ./no/such/folder"),
        ({"model": "{tmp}"}, "neither a config.json nor a GGUF file"),
        ({"model": "{tmp}", "gguf_file": "x.gguf"}, "no x.gguf in .*; found: none"),
        ({"model": "{tmp}/file.txt"}, "is a file; give the directory"),
    ],
)
def test_missing_sources_are_named(config: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    values = {key: value.replace("{tmp}", str(tmp_path)) for key, value in config.items()}
    with pytest.raises(ModelError, match=message) as caught:
        load_teacher(TeacherConfig(**values))
    assert "\n" not in str(caught.value)


def make_tokenizer(*words: str) -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])


def test_tokenizers_of_equal_content_pass_and_surplus_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    check_tokenizers(make_tokenizer("<unk>", "a", "b"), make_tokenizer("<unk>", "a", "b"))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_tokenizers(make_tokenizer("<unk>", "a"), make_tokenizer("<unk>", "a", "<think>"))
    assert "first '<think>' (id 2, the teacher's)" in caplog.text


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (("<unk>", "a", "b", "d"), "differ at 1 of 4 ids: id 3 is 'd' to the student and 'c' to the teacher"),
        (("<unk>", "b", "a", "c"), "differ at 2 of 4 ids: id 1 is 'b' to the student and 'a' to the teacher"),
    ],
)
def test_same_size_with_other_content_is_refused(student: tuple[str, ...], message: str) -> None:
    with pytest.raises(TokenizerMismatch, match=message):
        check_tokenizers(make_tokenizer(*student), make_tokenizer("<unk>", "a", "b", "c"))


def test_tokens_without_a_row_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = make_teacher("llama")
    assert check_vocabulary(model, make_tokenizer("<unk>", "a"), role="student") == 48
    assert not caplog.records
    words = make_tokenizer(*(f"w{index}" for index in range(50)))
    assert check_vocabulary(model, words, role="student") == 48
    assert "2 token(s) of the tokenizer, first 'w48' (id 48), are not embedded by the student" in caplog.text


def test_tokenizer_is_loaded_from_its_own_folder_or_the_model_s(tmp_path: Path) -> None:
    make_tokenizer("<unk>", "a", "b").save_pretrained(tmp_path / "tokens")
    make_teacher("llama").save_pretrained(tmp_path / "model")
    config = TeacherConfig(model=str(tmp_path / "model"), tokenizer=str(tmp_path / "tokens"))
    assert load_tokenizer(config)("a b")["input_ids"] == [1, 2]
    make_tokenizer("<unk>", "b", "a").save_pretrained(tmp_path / "model")
    assert load_tokenizer(TeacherConfig(model=str(tmp_path / "model")))("a b")["input_ids"] == [2, 1]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_text_longer_than_learnt_positions_is_refused(name: str) -> None:
    model = make_model(name, max_position_embeddings=32)
    check_positions(model, 32, role="student")
    with pytest.raises(ModelError, match=r"seq_len 33 is beyond the student's 32 positions, .* to 32 or less"):
        check_positions(model, 33, role="student")


def test_text_longer_than_rotary_positions_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", max_position_embeddings=32)
    check_positions(model, 32, role="teacher")
    assert not caplog.records
    check_positions(model, 33, role="teacher")
    assert "data.seq_len 33 is beyond the teacher's 32 positions" in caplog.text


def test_progress_bars_are_off_for_a_while() -> None:
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        with progress_bars(False):
            assert not bars.is_progress_bar_enabled()
        assert bars.is_progress_bar_enabled()
        with progress_bars(True):
            assert bars.is_progress_bar_enabled()
    finally:
        if not before:
            bars.disable_progress_bar()
