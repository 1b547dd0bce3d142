"""What a type checker makes of the public API, as a user's program calls it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = """\
import torch
import kd_plugin as kd

config = kd.DistillConfig(temperature=2.0)
hidden, weight, targets = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, dtype=torch.int64)
loss: torch.Tensor = kd.distill_loss(hidden, weight, hidden, weight, targets, config=config).loss
"""
WRONG = {
    "a text where a tensor is wanted": ("kd.distill_loss(hidden,", 'kd.distill_loss("a",', "hidden", 6),
    "a setting that does not exist": ("temperature=2.0", "temprature=2.0", "temprature", 4),
    "a result of another type": ("loss: torch.Tensor", "loss: str", "str", 6),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="basedpyright not installed")


def checked(folder: Path, **programs: str) -> tuple[int, list[tuple[str, int, str]]]:
    """Exit code, and file, line and message of each error."""
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = [(Path(one["file"]).stem, one["range"]["start"]["line"] + 1, one["message"]) for one in found]
    return done.returncode, lines


def test_a_right_call_of_the_public_api_passes(tmp_path):
    assert checked(tmp_path, right=RIGHT) == (0, [])


def test_wrong_calls_are_named_with_their_lines(tmp_path):
    programs = {f"wrong_{index}": RIGHT.replace(old, new) for index, (old, new, *_) in enumerate(WRONG.values())}
    code, found = checked(tmp_path, **programs)
    assert code == 1
    for index, (what, (_, _, named, line)) in enumerate(WRONG.items()):
        lines = [(place, message) for name, place, message in found if name == f"wrong_{index}"]
        assert any(place == line and named in message for place, message in lines), (what, lines)
