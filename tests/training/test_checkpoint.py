"""Resumed runs are the run that was never stopped; broken or foreign checkpoints are never picked up."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import kd_plugin as kd
from kd_plugin.loss.chunk_size import ChunkSize
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.run import TrainResult
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"), tied=True, dropout=0.1)  # so that random state matters


def config_of(folder: Path, name: str, **train: object) -> RunConfig:
    return run_config(folder, name, train={"max_steps": 4, "save_every": 2, **train})


def numbers(result: TrainResult) -> list[tuple[float, float]]:
    return [(values["loss"], values["grad_norm"]) for values in result.history]


def test_four_steps_equal_two_and_resume_and_two_bit_for_bit(folder: Path) -> None:
    whole = kd.train(config_of(folder, "exact"))
    weights = load_file(whole.export_dir / "model.safetensors")
    shutil.rmtree(whole.output_dir / "checkpoints" / "step_00000004")
    resumed = kd.train(config_of(folder, "exact", resume=True))
    assert [values["step"] for values in resumed.history] == [3, 4]
    assert numbers(resumed) == numbers(whole)[2:]
    again = load_file(resumed.export_dir / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_a_resumed_run_keeps_its_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, where free memory decides: with more of it later, as before; with less, said."""

    def room_for(rows: int) -> None:
        monkeypatch.setattr("kd_plugin.exchange.agreed_chunk.chunk_size_on", lambda *_: ChunkSize(rows, "free memory"))

    def run(**train: object) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            config = config_of(folder, "chunks", export=False, **train)
            kd.train(config.model_copy(update={"distill": config.distill.model_copy(update={"chunk_size": "auto"})}))
        return caplog.text

    room_for(40)
    assert "distill.chunk_size: auto -> 40 rows (by free memory)" in run(max_steps=1, save_every=1)
    room_for(50)
    text = run(max_steps=2, save_every=2, resume=True)
    assert "auto -> 40 rows (by the checkpoint)" in text and "last bits" not in text
    room_for(30)
    text = run(max_steps=3, resume=True)
    assert "auto -> 30 rows (by free memory)" in text
    assert "the checkpoint was written with 40 rows per chunk, for which there is no room here" in text


def test_a_finished_run_resumes_to_its_export(folder: Path) -> None:
    whole = kd.train(config_of(folder, "finished"))
    resumed = kd.train(config_of(folder, "finished", resume=True))
    assert resumed.history == [] and resumed.step == 4
    assert resumed.after["perplexity"] == pytest.approx(whole.after["perplexity"], rel=1e-6)


def test_before_is_before_step_one_however_often_a_run_was_resumed(folder: Path) -> None:
    first = kd.train(config_of(folder, "truth", max_steps=2))
    second = kd.train(config_of(folder, "truth", resume=True))
    assert second.before == first.before and second.before != first.after
    summary = json.loads((second.output_dir / "summary.json").read_text())
    assert summary["before"] == first.before and summary["after"] == second.after
    third = kd.train(config_of(folder, "truth", resume=True))
    assert third.before == first.before and third.after == pytest.approx(second.after)
    assert json.loads((second.output_dir / "summary.json").read_text()) == summary, "it trained nothing"


def test_only_the_newest_checkpoints_are_kept(folder: Path) -> None:
    kd.train(config_of(folder, "kept", save_every=1, keep_checkpoints=2, export=False))
    assert [path.name for path in checkpoint.checkpoints(folder / "kept")] == ["step_00000003", "step_00000004"]


def test_a_killed_save_is_not_picked_up(folder: Path) -> None:
    output = kd.train(config_of(folder, "killed", export=False)).output_dir
    newest = checkpoint.checkpoints(output)[-1]
    newest.rename(newest.with_name(newest.name + ".partial"))
    assert checkpoint.checkpoints(output)[-1].name == "step_00000002"
    resumed = kd.train(config_of(folder, "killed", resume=True, export=False))
    assert [values["step"] for values in resumed.history] == [3, 4]
    assert not list(output.glob("checkpoints/*.partial"))


def test_checkpoints_of_another_run_are_not_overwritten(folder: Path) -> None:
    kd.train(config_of(folder, "taken", max_steps=2, export=False))
    with pytest.raises(checkpoint.CheckpointError, match=r"holds checkpoints of another run \(step_00000002\)"):
        kd.train(config_of(folder, "taken", export=False))


def test_resume_without_a_checkpoint_starts_at_step_one(folder: Path) -> None:
    result = kd.train(config_of(folder, "fresh", resume=True, save_every=0, max_steps=1, export=False))
    assert [values["step"] for values in result.history] == [1]


def test_a_checkpoint_of_another_backend_is_refused(folder: Path) -> None:
    output = kd.train(config_of(folder, "foreign", max_steps=2, export=False)).output_dir
    note = checkpoint.checkpoints(output)[-1] / "run.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "parallel": "deepspeed"}))
    with pytest.raises(checkpoint.CheckpointError, match=r"was written by train\.parallel deepspeed"):
        kd.train(config_of(folder, "foreign", resume=True, export=False))


def test_a_changed_objective_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kd.train(config_of(folder, "changed", max_steps=2, export=False))
    distill = {"row_kernel": "eager", "temperature": 1.0}
    train = {"max_steps": 4, "save_every": 2, "resume": True, "export": False}
    kd.train(run_config(folder, "changed", distill=distill, train=train))
    assert "section distill differs" in caplog.text and "section data differs" not in caplog.text
