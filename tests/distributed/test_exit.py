"""A process that ends well exits with 0, however late gloo's threads are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def late_gloo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library to preload, which makes gloo's threads late."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("late") / "late_gloo.so"
    # libstdc++ is linked, so that the function that is replaced can be found.
    options = ["-shared", "-fPIC", "-O1", str(HERE / "late_gloo.c"), "-o", str(library)]
    subprocess.run([compiler, *options, "-ldl", "-Wl,--no-as-needed", "-lstdc++"], check=True)
    return str(library)


def end_by(ending: str, library: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("LD_PRELOAD", library)
    return launch(HERE / "exit_worker.py", ending, ranks=2, timeout_s=150)


def test_a_rank_that_ends_well_exits_with_0(late_gloo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = end_by("library", late_gloo, monkeypatch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "terminate called" not in done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="threads that need an ending interpreter wait, from 3.14 on")
def test_destroying_the_process_group_alone_does_not_do(late_gloo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement would notice."""
    done = end_by("torch", late_gloo, monkeypatch)
    assert done.returncode != 0 and "terminate called without an active exception" in done.stderr
