"""Accelerate's trackers get every number; the packages behind them are stand-ins that keep what they are given."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import kd_plugin as kd
from kd_plugin.training.preflight import early_problems
from tests.tiny_runs import make_folder, run_config

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def package(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    return module


def same_as_the_file(logged: list[tuple[int, dict[str, float]]], folder: Path) -> bool:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return logged == [(line.pop("step"), {k: v for k, v in line.items() if k != "time"}) for line in lines]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_number_and_the_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    begun: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, float]]] = []
    ended: list[bool] = []
    run = SimpleNamespace(
        log=lambda values, step=None, **_: logged.append((step, values)), finish=lambda: ended.append(True)
    )

    def init(**arguments: Any) -> SimpleNamespace:
        begun.append(arguments)
        return run

    config = SimpleNamespace(update=lambda values, **_: settings.update(values))
    monkeypatch.setitem(sys.modules, name, package(name, init=init, config=config))
    log = {"report_to": [name], "output_dir": str(folder / name), "tensorboard": False}
    result = kd.train(run_config(folder, log=log, train={"max_steps": 2, "export": False}))
    assert begun == [{"project": "kd_plugin", "name": name}] and ended == [True]
    assert settings["train.max_steps"] == 2 and settings["distill.temperature"] == 2.0
    assert len(logged) == 4 and same_as_the_file(logged, result.output_dir)


def test_mlflow_gets_every_number_and_the_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, float]]] = []
    calls: list[Any] = []
    mlflow = package(
        "mlflow",
        search_experiments=lambda **_: [],
        create_experiment=lambda **given: given["name"],
        start_run=lambda **given: calls.append((given["experiment_id"], given["run_name"])),
        log_params=lambda values: settings.update(values),
        log_metrics=lambda values, step: logged.append((step, values)),
        end_run=lambda: calls.append("end"),
        utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    log = {"report_to": ["mlflow"], "output_dir": str(folder / "mlflow"), "tensorboard": False}
    result = kd.train(run_config(folder, log=log, train={"max_steps": 2, "export": False}))
    assert calls == [("kd_plugin", "mlflow"), "end"]
    assert settings["train.max_steps"] in (2, "2") and same_as_the_file(logged, result.output_dir)


def test_a_tracker_that_is_not_installed_is_named(folder: Path) -> None:
    missing = [name for name in ("wandb", "trackio", "mlflow") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all are installed")
    lines = early_problems(run_config(folder, log={"report_to": missing}))
    assert lines == [f"{n} is not installed and log.report_to names it: pip install {n}" for n in sorted(missing)]


def test_tensorboard_cannot_be_named_and_switched_off(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"report_to names tensorboard, but log\.tensorboard is false"):
        run_config(folder, log={"report_to": ["tensorboard"], "tensorboard": False})
