"""Files that a user named and that are broken, incomplete or of another kind: one line with the culprit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kd_plugin as kd
from kd_plugin.data.documents import DataError
from kd_plugin.models.files import resolve_tokenizer
from kd_plugin.models.loading import ModelError, load_teacher, load_tokenizer, resolve_source
from kd_plugin.settings.run import RunConfig, TeacherConfig
from kd_plugin.training.preflight import SetupError, early_problems
from tests import tiny_runs

transformers = pytest.importorskip("transformers")
Change = Callable[[Path], object]
SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.make_teacher(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def sharded(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    transformers.AutoModelForCausalLM.from_pretrained(good).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / SHARD).is_file()
    return folder


def cut(name: str, length: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def overwrite(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def refusal(
    tmp_path: Path, original: Path, change: Change, load: Callable[[TeacherConfig], object], **values: object
) -> str:
    shutil.copytree(original, tmp_path / "x", dirs_exist_ok=True)
    change(tmp_path / "x")
    with pytest.raises(ModelError) as caught:
        load(TeacherConfig(model=str(tmp_path / "x"), **values))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("teacher.model: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            cut(SINGLE, -100),
            rf"{SINGLE} is cut short or damaged \(\d+ bytes, should be \d+\): download or copy it again",
        ),
        (cut(SINGLE, 50), rf"{SINGLE} is cut short or no safetensors file \(50 bytes\)"),
        (cut(SINGLE, 0), rf"{SINGLE} is cut short or no safetensors file \(0 bytes\)"),
        (overwrite(SINGLE, "<!doctype html>" * 9), rf"{SINGLE} is cut short or no safetensors file"),
        (overwrite(SINGLE, "\5" + "\0" * 7 + "hello"), rf"{SINGLE} is no safetensors file"),
        (
            overwrite(SINGLE, "version https://git-lfs.github.com/spec/v1\n"),
            rf"{SINGLE} is a pointer of Git LFS, .*pull",
        ),
        (overwrite("config.json", ""), "config.json is no JSON"),
        (overwrite("config.json", '{"model_type": "nope"}'), "has model type `nope`"),
        (overwrite("config.json", '{"model_type": "llama", "vocab_size": "x"}'), "Field 'vocab_size' expected int"),
    ],
)
def test_a_broken_file_of_a_model_is_named(good: Path, tmp_path: Path, change: Change, said: str) -> None:
    message = refusal(tmp_path, good, change, load_teacher)
    assert re.search(said, message) and str(tmp_path / "x") in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing, which {INDEX} names"),
        (cut(SHARD, -10), f"{SHARD} is cut short or damaged"),
        (cut(SHARD, 0), f"{SHARD} is cut short or no safetensors file"),
        (overwrite(INDEX, "{"), f"{INDEX} is no list of weights"),
        (overwrite(INDEX, "[]"), f"{INDEX} is no list of weights"),
    ],
)
def test_a_broken_shard_is_named_at_load_and_by_validate(
    sharded: Path, tmp_path: Path, change: Change, said: str
) -> None:
    assert said in refusal(tmp_path, sharded, change, load_teacher)
    student, teacher = {"model": str(tmp_path / "x")}, {"model": str(sharded)}
    config = RunConfig.model_validate({"student": student, "teacher": teacher, "data": {"train": "python_docs"}})
    (line,) = early_problems(config)
    assert line.startswith(f"student.model: {tmp_path / 'x'}: ") and said in line
    fresh = {**student, "from_config": {"num_hidden_layers": 2}}  # reads no weights
    assert not early_problems(RunConfig.model_validate({"student": fresh, "teacher": teacher}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (overwrite("tokenizer.json", "{"), "tokenizer.json is no JSON"),
        (overwrite("tokenizer.json", "{}"), "KeyError"),
        (overwrite("tokenizer_config.json", ""), "tokenizer_config.json is no JSON"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "Couldn't instantiate the backend tokenizer from one of: ",
        ),
    ],
)
def test_a_broken_tokenizer_is_named(good: Path, tmp_path: Path, change: Change, said: str) -> None:
    message = refusal(tmp_path, good, change, load_tokenizer)
    assert said in message and not message.endswith(":")


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, None])
def test_broken_pickled_weights_are_named(good: Path, tmp_path: Path, content: bytes | None) -> None:
    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        torch.save(transformers.AutoModelForCausalLM.from_pretrained(good).state_dict(), folder / "pytorch_model.bin")
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[:-999] if content is None else content)

    message = refusal(tmp_path, good, change, load_teacher, allow_pickle=True)
    assert "pytorch_model.bin is cut short or no weights: download or copy it again" in message


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"GGUF" + bytes(20)])
def test_a_broken_gguf_file_is_named(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(content)
    for load in (load_teacher, load_tokenizer):
        with pytest.raises(ModelError, match=r"^teacher\.model: '.*/x\.gguf' cannot be loaded: .") as caught:
            load(TeacherConfig(model=str(tmp_path)))
        assert "\n" not in str(caught.value)


# Files that load and do not belong together


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})

    return change


def edit_config(**values: int) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            edit_weights(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
            "1 of .*, first lm_head.weight,",
        ),
        (edit_weights(lambda w: {f"base.{k}": v for k, v in w.items()}), "39 of the model's parameters, first lm_head"),
        (edit_config(num_hidden_layers=5), "9 of the model's parameters, first model.layers.4.input_layernorm.weight"),
        (
            edit_config(vocab_size=65),
            r"first lm_head\.weight, which is \[64, 32\] in the file and \[65, 32\] in the model",
        ),
    ],
)
def test_weights_that_would_be_drawn_at_random_are_refused(
    good: Path, tmp_path: Path, change: Change, said: str
) -> None:
    assert re.search(said, refusal(tmp_path, good, change, load_teacher))


def test_weights_without_a_place_are_reported(good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(good, tmp_path / "x")
    edit_weights(lambda w: {**w, "v_head.weight": torch.zeros(3)})(tmp_path / "x")
    with caplog.at_level(logging.WARNING):
        load_teacher(TeacherConfig(model=str(tmp_path / "x")))
    assert "teacher.model: 1 weight(s) of the files have no place in the model, first v_head.weight" in caplog.text


def test_an_adapter_is_no_model(good: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(good)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(good)
    for name in ("teacher", "student"):
        values = {"student": {"model": str(good)}, "teacher": {"model": str(good)}, name: {"model": str(adapter)}}
        (line,) = early_problems(RunConfig.model_validate(values))
        assert line.startswith(f"{name}.model: {adapter} is a PEFT adapter, not a model: merge it into its base")
        assert "\n" not in line
        tokenizer.save_pretrained(adapter)  # what trainers write beside it
    with pytest.raises(ModelError, match="PEFT adapter"):
        resolve_source(TeacherConfig(model=str(adapter)))
    assert resolve_tokenizer(TeacherConfig(model=str(good), tokenizer=str(adapter))).path_or_id == str(adapter)


# Where a run writes, and how it is called


@pytest.mark.parametrize("name", ["/proc/x", "/proc/self/x/y", "{tmp}/" + "n" * 300, "{tmp}/a\0b"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tiny_runs.make_folder(tmp_path)
    name = name.replace("{tmp}", str(tmp_path))
    monkeypatch.setattr("kd_plugin.training.run.tokenizer_of", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SetupError, match=r"^log\.output_dir: .* cannot be written \(.+\); choose another folder$"):
        kd.train(tiny_runs.run_config(folder, log={"output_dir": name, "tensorboard": False}))


def test_a_look_at_the_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    config = tiny_runs.run_config(tiny_runs.make_folder(tmp_path / "x"), log={"output_dir": str(tmp_path / "a" / "b")})
    (tmp_path / "a").mkdir()
    assert not early_problems(config) and not list((tmp_path / "a").iterdir())


def test_train_wants_a_configuration_and_says_how_to_get_one() -> None:
    for given in ("my.yaml", Path("my.yaml")):
        with pytest.raises(
            ValueError, match=r"^kd\.train wants a RunConfig, .*: kd\.train\(kd\.load_config\('my\.yaml'\)\)$"
        ):
            kd.train(given)
    with pytest.raises(
        ValueError, match=r"^kd\.train wants a RunConfig, found DistillConfig: .*kd\.load_config\(PATH\)"
    ):
        kd.train(kd.DistillConfig())


def test_a_parquet_file_that_breaks_in_the_middle_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text number {i}" for i in range(999)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[20:2000] = bytes(1980)
    path.write_bytes(content)
    folder = tiny_runs.make_folder(tmp_path / "tiny")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file \(.+\)$") as caught:
        kd.train(tiny_runs.run_config(folder, data={"train": str(path)}))
    assert "\n" not in str(caught.value)
