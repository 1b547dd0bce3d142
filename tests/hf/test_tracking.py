"""TensorBoard under the Trainer: the tags, charts and descriptions of `kd.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback

from kd_plugin.hf import DistillTrainer
from kd_plugin.hf.tracking import DistillTensorBoardCallback, tags_of
from kd_plugin.training.tensorboard import TAGS
from tests.hf_runs import CONFIG, make_rows, trainer_of

ROWS, HELD_OUT = make_rows(16), make_rows(4, seed=9)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two steps with an evaluation, and what was logged."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tb"))
        trainer = trainer_of(
            DistillTrainer,
            folder,
            train_dataset=ROWS,
            eval_dataset=HELD_OUT,
            args={"report_to": ["tensorboard"], "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        )
        trainer.train()
    return folder / "tb", trainer.state.log_history


def test_numbers_have_the_tags_of_a_run_of_ours(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, history = run
    found = scalars(folder)
    first = history[0]
    for name in ("loss", "soft_loss", "hard_loss", "top1_agreement", "kl_t1", "acceptance_rate", "peak_rss_gib"):
        assert found[TAGS[name]][0] == (1, pytest.approx(first[name], rel=1e-5)), name
    assert found["train/lr"] == found["train/learning_rate"]
    assert [step for step, _ in found["eval/soft_loss"]] == [1, 2]
    assert not [tag for tag in found if tag.startswith("train/top1") or tag.startswith("eval/eval")]


def test_charts_have_their_lines(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, history = run
    for line, name in (("total", "loss"), ("soft", "soft_loss"), ("hard", "hard_loss")):
        points = scalars(folder / "lines" / line)["a_loss/components"]
        assert points[0] == (1, pytest.approx(history[0][name], rel=1e-5))
    assert [step for step, _ in scalars(folder / "lines" / "eval")["a_loss/kl_vs_eval"]] == [1, 2]


def test_what_is_unknown_keeps_the_tag_of_the_trainer() -> None:
    tags = tags_of({"mean_token_accuracy": 0.5, "eval_runtime": 2.0, "note": "text", "epoch": 1})
    assert tags == {"train/mean_token_accuracy": 0.5, "eval/runtime": 2.0, "train/epoch": 1}


def test_a_writer_that_the_user_brings_stays(tmp_path: Path) -> None:
    class Own:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    theirs = TensorBoardCallback(Own())
    trainer = trainer_of(DistillTrainer, tmp_path, callbacks=[theirs])
    assert theirs in trainer.callback_handler.callbacks
    trainer = trainer_of(DistillTrainer, tmp_path, args={"report_to": ["tensorboard"]})
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert DistillTensorBoardCallback in kinds and TensorBoardCallback not in kinds
    assert trainer.distill == CONFIG
