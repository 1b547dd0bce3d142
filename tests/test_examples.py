"""The examples of launch/examples run as they stand, and are as short as their README says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "launch" / "examples"
OWN_LOOPS = ["plain_loop", "accelerate_loop", "lightning_module"]
TRAINERS = ["hf_trainer", "trl_sft", "trl_on_policy"]
LINES = 40


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(sys, "argv", [name, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
            return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_all_of_them_are_listed_and_short() -> None:
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert sorted(lines) == sorted([*OWN_LOOPS, *TRAINERS])
    assert max(lines.values()) <= LINES


# Lightning 2.6 asks torch's trees by a name that torch 2.13 deprecates, and advises on workers and intervals of logging
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '?train_dataloader'? does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("name", OWN_LOOPS)
def test_a_loop_of_your_own(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(name, monkeypatch)
    shown = [line for line in capsys.readouterr().out.splitlines() if "soft_loss" in line]
    losses = [float(line.partition("loss ")[2].split()[0]) for line in shown]
    assert len(losses) >= 3 and all(2 < loss < 5 for loss in losses)


@pytest.mark.slow
# TRL 1.16 sets and calls it by the names that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = run(name, monkeypatch, str(tmp_path))["trainer"]
    logged = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    assert len(logged) == 3 and all(entry["loss"] > 0 for entry in logged)
    if name == "hf_trainer":
        assert "eval_soft_loss" in trainer.state.log_history[-2]
        events = next(tmp_path.rglob("events.out.tfevents.*")).read_bytes()
        assert b"train/soft_loss" in events and b"eval/soft_loss" in events
