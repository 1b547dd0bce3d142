"""Steps from epochs and ratios, runs that end early, and the export of the best student."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.settings.held_out import is_better
from kd_plugin.training.best import Best, EarlyStop
from kd_plugin.training.loop import evaluate
from kd_plugin.training.preflight import early_problems, idle_settings
from kd_plugin.training.schedule import with_steps
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def steps_of(folder: Path, **train: Any) -> tuple[int, int]:
    config = run_config(folder, train={"max_steps": 100, "warmup_steps": 0, **train})
    made = with_steps(config, num_sequences=50, sequences_per_step=8).train
    return made.max_steps, made.warmup_steps


def test_epochs_and_ratios_come_to_steps(folder: Path) -> None:
    assert steps_of(folder) == (100, 0)
    assert steps_of(folder, epochs=1) == (7, 0), "the text is read to its end"
    assert steps_of(folder, epochs=2.5, warmup_ratio=0.25) == (16, 4)
    assert steps_of(folder, warmup_ratio=0.03) == (100, 3)
    assert steps_of(folder, epochs=0.01) == (1, 0)
    assert steps_of(folder, epochs=1, max_steps=7) == (7, 0), "a saved config.yaml spells it out"


@pytest.mark.parametrize(
    ("train", "steps", "said"),
    [
        ({"epochs": 1, "max_steps": 8}, (7, 0), "train.epochs 1: train.max_steps is 7 instead of 8"),
        (
            {"warmup_ratio": 0.5, "warmup_steps": 2},
            (100, 50),
            "train.warmup_ratio 0.5: train.warmup_steps is 50 instead of 2",
        ),
    ],
)
def test_shares_go_before_a_recipe_s_steps_which_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, train: dict[str, Any], steps: tuple[int, int], said: str
) -> None:
    with caplog.at_level("WARNING"):
        assert steps_of(folder, **train) == steps
    assert said in caplog.text


def test_a_run_of_one_epoch_reads_every_sequence_once(folder: Path) -> None:
    train = {"max_steps": 100, "warmup_steps": 0, "warmup_ratio": 0.5, "epochs": 1, "export": False}
    result = kd.train(run_config(folder, "epoch", train=train))
    saved = kd.load_config(result.output_dir / "config.yaml").train
    assert result.step == saved.max_steps < 100 and saved.warmup_steps == round(0.5 * result.step)
    assert max(values["lr"] for values in result.history) == pytest.approx(5e-3)


def test_better_is_larger_for_shares_and_smaller_for_losses() -> None:
    assert is_better("kl_t1", 1.0, 2.0) and not is_better("kl_t1", 2.0, 2.0) and not is_better("kl_t1", math.nan, 2.0)
    assert is_better("top1_agreement", 0.5, 0.4) and not is_better("top1_agreement", 0.5, 0.4, min_change=0.2)


def test_patience_counts_evaluations_without_a_better_one_and_goes_on_after_resuming(tmp_path: Path) -> None:
    stop = {"metric": "hard_loss", "patience": 2, "min_change": 0.1}
    config = run_config(tmp_path, train={"stop_on": stop, "eval_every": 1})
    values = [5.0, 4.0, 3.95, math.nan]
    watch = EarlyStop(config, done=None)
    assert [watch.ends(step, {"hard_loss": value}) for step, value in enumerate(values)] == [False, False, False, True]

    output = Path(config.log.output_dir)
    output.mkdir()
    finite = [value if math.isfinite(value) else None for value in [9.0, *values]]
    lines = [{"step": step, "eval/hard_loss": value} for step, value in enumerate(finite)]
    lines.insert(3, {**lines[2]})  # evaluated again where an earlier run was resumed
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert EarlyStop(config, done=3).ends(4, {"hard_loss": 3.95}), "one of the two is behind already"
    assert not EarlyStop(config, done=2).ends(3, {"hard_loss": 3.95})
    assert EarlyStop(config, done=4).is_over, "a run that has ended so is not trained on"


def test_a_run_ends_when_the_metric_gets_no_better_and_exports_the_best(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate that ruins the student after its second step, the evaluations get worse from there on."""
    from transformers import AutoModelForCausalLM

    rates = {1: 5e-3, 2: 5e-3}
    monkeypatch.setattr("kd_plugin.training.loop.learning_rate_at", lambda step, train: rates.get(step, 0.5))
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def watched(session: Any, step: int) -> dict[str, float]:
        kept[step] = {name: value.clone() for name, value in session.engine.full_state_dict().items()}
        return evaluate(session, step)

    monkeypatch.setattr("kd_plugin.training.loop.evaluate", watched)
    train = {"max_steps": 20, "eval_every": 1, "export_best": "hard_loss"}
    train["stop_on"] = {"metric": "hard_loss", "patience": 2}
    result = kd.train(run_config(folder, "best", train=train))
    held_out = {
        line["step"]: line["eval/hard_loss"]
        for line in map(json.loads, (result.output_dir / "metrics.jsonl").read_text().splitlines())
        if "eval/hard_loss" in line
    }
    best = min(held_out, key=lambda step: held_out[step])
    last = max(held_out)
    assert 1 <= best < last == best + 2 < 20
    assert result.step == best and result.after["hard_loss"] == held_out[best]
    assert result.export_dir is not None
    exported = AutoModelForCausalLM.from_pretrained(result.export_dir, dtype=torch.float32).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in kept[best].items())
    assert not all(torch.equal(exported[name], value) for name, value in kept[last].items())

    config = run_config(folder, "best", train=train)
    assert Best(config, done=best).step == best and Best(config, done=best - 1).step is None
    shutil.rmtree(result.output_dir)


def test_metrics_that_are_not_measured_are_refused_and_idle_settings_named(folder: Path) -> None:
    alone = run_config(folder, distill={"soft_weight": 0.0}, train={"export_best": "kl_t1", "eval_every": 1})
    assert any(line.startswith("train.export_best is kl_t1, which needs the teacher") for line in early_problems(alone))
    sorting = {"divergence": "uld"}
    uld = run_config(folder, distill=sorting, train={"stop_on": {"metric": "kl_t1"}, "eval_every": 1})
    assert any(line.startswith("train.stop_on.metric is kl_t1, which needs tokens") for line in early_problems(uld))
    idle = idle_settings(run_config(folder, train={"stop_on": {}, "export_best": "kl_t1"}))
    assert [line.split()[0] for line in idle] == ["train.stop_on", "train.export_best"]


def test_the_optimizer_is_fused_where_its_name_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    original = torch.optim.AdamW.__init__

    def watched(self: Any, *args: Any, **settings: Any) -> None:
        made.append(settings["fused"])
        original(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", watched)
    losses = []
    for name in ("auto", "adamw_fused", "adamw"):
        train = {"optimizer": name, "max_steps": 3, "export": False}
        losses.append([values["loss"] for values in kd.train(run_config(folder, f"opt_{name}", train=train)).history])
    assert made == [True, True, False]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
