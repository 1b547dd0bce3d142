"""Students: layers of the teacher, fresh ones, frozen parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_plugin.models.loading import build_student
from kd_plugin.models.students import StudentError, config_with, evenly_spaced
from kd_plugin.settings.run import StudentConfig
from tests.six_layer_models import TEACHERS, from_teacher, layers_of, make_teacher, tokens
from tests.tiny_models import make_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=TEACHERS)
def teacher(request: pytest.FixtureRequest) -> torch.nn.Module:
    return make_teacher(request.param)


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
    teacher = make_model("gpt2", width=16, num_hidden_layers=6, scale_attn_by_inverse_layer_idx=True)
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


@pytest.mark.parametrize("name", TEACHERS)
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
    student = build_student(from_teacher(2, freeze=["embed", "layers.0."]), make_teacher("llama_tied"), seed=0)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("embed" not in name and "layers.0." not in name), name
    # Tied: freezing the head by its own name freezes the shared matrix.
    student = build_student(from_teacher(2, freeze=["lm_head"]), make_teacher("llama_tied"), seed=0)
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
