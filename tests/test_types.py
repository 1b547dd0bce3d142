"""What a type checker makes of the public API, as a user's program calls it."""

import importlib.util
import json
import re
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Line and message of each error, by program: `right`, or what is wrong."""
    folder = tmp_path_factory.mktemp("types")
    names = {"right": "right", **{f"wrong_{index}": what for index, what in enumerate(WRONG)}}
    for name, what in names.items():
        old, new, *_ = WRONG.get(what, ("", ""))
        (folder / f"{name}.py").write_text(RIGHT.replace(old, new), encoding="utf-8")
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "some programs are wrong"
    errors: dict[str, list[tuple[int, str]]] = {what: [] for what in names.values()}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        errors[names[Path(one["file"]).stem]].append((one["range"]["start"]["line"] + 1, one["message"]))
    return errors


def test_a_right_call_of_the_public_api_passes(found):
    assert found["right"] == []


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_named_with_its_line(found, what):
    _, _, named, line = WRONG[what]
    assert any(place == line and named in message for place, message in found[what]), found[what]


LEFT_OUT = {
    "reportUnknown(Member|Variable|Argument)Type": "torch and OmegaConf do not say all of their types",
    "reportUntypedFunctionDecorator": "nor does torch.compiler.disable",
    "reportUnnecessary(IsInstance|Comparison)": "users pass other types, and a layer's bias may be None",
    "reportDeprecated": "contextmanager on a function that is said to return an Iterator",
    "reportMatchNotExhaustive": "what pydantic names beside the cases is left as it is",
    "reportPrivateUsage": "attach() makes a Plugin",
}


def test_the_home_of_every_public_name_is_checked_strictly_but_for_known_reasons() -> None:
    stub = (ROOT / "kd_plugin" / "__init__.pyi").read_text(encoding="utf-8")
    homes = {path.replace(".", "/") for path in re.findall(r"^from \.([\w.]+\.\w+) import", stub, re.MULTILINE)}
    assert len(homes) > 10
    for home in homes:
        text = (ROOT / "kd_plugin" / f"{home}.py").read_text(encoding="utf-8")
        assert text.startswith("# pyright: strict\n"), home
        for rule in re.findall(r"(report\w+)=false", text):
            assert any(re.fullmatch(known, rule) for known in LEFT_OUT), f"{home}: {rule}"
