"""The settings themselves, as Python objects."""

from __future__ import annotations

from typing import Any

import pytest

from kd_plugin.settings import run as settings
from kd_plugin.settings.distill import SettingsError
from kd_plugin.settings.run import (
    DataConfig,
    DistillConfig,
    LogConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

SECTIONS = [DataConfig, DistillConfig, LogConfig, StudentConfig, TeacherConfig, TrainConfig]


@pytest.mark.parametrize("section", [getattr(settings, name) for name in settings.__all__])
def test_every_setting_is_documented(section: type[settings.Section]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    if section is RunConfig:  # its sections are documented by their own docstrings
        undocumented = [name for name in undocumented if name not in RunConfig.model_fields]
    assert not undocumented
    assert section.__doc__


@pytest.mark.parametrize("section", [DataConfig, DistillConfig, LogConfig, TrainConfig])
def test_defaults_are_valid_when_given_explicitly(section: type[settings.Section]) -> None:
    assert section.model_validate(section().model_dump()) == section()


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DistillConfig().temperature = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_are_refused(section: type[settings.Section]) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        section.model_validate({"no_such_key": 1})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (DistillConfig, {"temperature": 0}),
        (DistillConfig, {"temperature": -1}),
        (DistillConfig, {"temperature": float("inf")}),
        (DistillConfig, {"temperature": float("nan")}),
        (DistillConfig, {"beta": 0}),
        (DistillConfig, {"beta": 1}),
        (DistillConfig, {"chunk_size": 0}),
        (DistillConfig, {"chunk_size": "all"}),
        (DistillConfig, {"soft_weight": -0.1}),
        (DistillConfig, {"divergence": "kl"}),
        (TrainConfig, {"max_steps": 0}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"eval_sequences": 0}),
        (TrainConfig, {"learning_rate": 0}),
        (TrainConfig, {"adam_betas": (0.9, 1.0)}),
        (TrainConfig, {"max_grad_norm": 0}),
        (TrainConfig, {"schedule": "cosin"}),
        (DataConfig, {"eval_fraction": 1.0}),
        (DataConfig, {"seq_len": 1}),
        (TeacherConfig, {"model": ""}),
        (TeacherConfig, {}),
    ],
)
def test_values_out_of_range_are_refused(section: type[settings.Section], values: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        section.model_validate(values)
    assert [detail["loc"][0] for detail in caught.value.errors()][:1] == list(values or {"model": None})[:1]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (TrainConfig, "max_steps"),
        (TrainConfig, "learning_rate"),
        (DistillConfig, "soft_weight"),
        (DistillConfig, "chunk_size"),
        (DataConfig, "train"),
    ],
)
def test_true_is_not_taken_for_the_number_one(section: type[settings.Section], key: str) -> None:
    with pytest.raises(ValueError, match="true/false"):
        section.model_validate({key: True})


def test_switches_take_true_and_false() -> None:
    assert TrainConfig(resume=True).resume is True
    assert DistillConfig(metrics=False).metrics is False


def test_an_objective_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be trained"):
        DistillConfig(soft_weight=0, hard_weight=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "student has no origin"),
        ({"model": "x", "from_teacher": {"layers": 2}}, "from_teacher excludes"),
        ({"from_config": {"hidden_size": 8}, "from_teacher": {"layers": 2}}, "from_teacher excludes"),
    ],
)
def test_a_student_has_one_origin(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentConfig.model_validate(values)


def test_a_fresh_student_may_name_the_model_whose_configuration_it_takes() -> None:
    student = StudentConfig(model="x", from_config={"num_hidden_layers": 2})
    assert student.from_config == {"num_hidden_layers": 2}


def test_an_empty_list_of_terms_is_refused() -> None:
    with pytest.raises(ValueError, match="terms is an empty list: name a divergence as in"):
        DistillConfig(terms=())


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"temprature": 1.0}, "DistillConfig: temprature: unknown setting; did you mean 'temperature'?"),
        ({"temperature": 0.0}, "DistillConfig: temperature: wants greater than 0 (got 0.0)"),
        ({"chunk_size": 0}, "DistillConfig: chunk_size: wants 'auto' or greater than 0 (got 0)"),
        (
            {"terms": [{"name": "tvd", "wieght": 1.0}]},
            "DistillConfig: terms.0.wieght: unknown setting; did you mean 'weight'?",
        ),
    ],
)
def test_settings_given_in_python_are_refused_in_one_line(settings_given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        DistillConfig(**settings_given)
    assert str(caught.value) == message
