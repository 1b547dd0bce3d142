"""Ctrl-C and SIGTERM in real processes: one line of ours, no traceback, the signal's exit code."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kd_plugin.cli.launcher import Stop, one_line_errors
from kd_plugin.settings.yaml_file import to_yaml
from kd_plugin.training.interrupt import Ended, last_step, one_line_end, reached
from tests.ranks.launch import REPOSITORY
from tests.tiny_runs import make_folder, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLI = ["-m", "kd_plugin.cli", "train"]
STEPS = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def endless(folder: Path, name: str, *, parallel: str = "auto", save_every: int = 0) -> list[str]:
    """Arguments of a run that ends when it is told to; with a checkpoint, after its first two steps."""
    train = {"max_steps": STEPS, "save_every": save_every, "parallel": parallel}
    config = run_config(folder, name, train=train, log={"every": 1, "output_dir": str(folder / name)})
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    return [str(folder / f"{name}.yaml")]


@contextmanager
def started(command: list[str], until: str) -> Iterator[subprocess.Popen[str]]:
    """The process, once it has printed `until`; dead with all its children afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job of `&` ignores it
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if until in line:
                break
        else:
            pytest.fail(f"ended before {until!r}: {process.stderr and process.stderr.read()}")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ours(text: str) -> list[str]:
    """Lines that speak of the end."""
    return [line for line in text.splitlines() if line.startswith(("interrupted", "ended by"))]


@pytest.mark.parametrize(("number", "what"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_one_process_ends_with_one_line_and_the_signals_code(folder: Path, number: signal.Signals, what: str) -> None:
    name = number.name.lower()
    with started([sys.executable, *CLI, *endless(folder, name)], until="step 3/") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith(f"{what} in step ") and f" of {STEPS}; saved: no checkpoint" in errors
    assert "train.save_every" in errors


def test_the_newest_checkpoint_and_how_to_go_on_are_named_and_it_goes_on(folder: Path) -> None:
    command = [sys.executable, "launch/train_fsdp.py", *endless(folder, "saved", save_every=2)]
    with started(command, until="checkpoint ") as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    newest = max((folder / "saved" / "checkpoints").glob("step_????????"))
    assert ours(errors) == errors.splitlines()
    assert f"saved: {newest}; train.resume=true continues from there" in errors
    with started([*command, "train.resume=true"], until=f"step {int(newest.name[5:]) + 1}/"):
        pass


@pytest.mark.slow
def test_torchruns_ranks_end_with_one_line_of_rank_zero(folder: Path) -> None:
    command = [*TORCHRUN, "launch/train_fsdp.py", *endless(folder, "torchrun", save_every=2)]
    with started(command, until="checkpoint ") as process:
        process.send_signal(signal.SIGINT)  # torchrun passes it on
        _, errors = process.communicate(timeout=60)
    assert len(ours(errors)) == 1, errors
    assert "train.resume=true continues from there" in ours(errors)[0]
    for word in ("CollectiveError", "kd_plugin/", 'launch/train_fsdp.py", line', "terminate called"):
        assert word not in errors, errors


@pytest.mark.slow
def test_deepspeeds_ranks_end_with_one_line_of_rank_zero(folder: Path) -> None:
    pytest.importorskip("deepspeed")
    launcher = [str(shutil.which("deepspeed", path=str(Path(sys.executable).parent))), "--num_accelerators", "2"]
    arguments = endless(folder, "deepspeed", parallel="deepspeed", save_every=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [*launcher, "--master_port", port, "launch/train_deepspeed.py", *arguments]
    with started(command, until="checkpoint ") as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = process.communicate(timeout=60)
    assert len(ours(errors + output)) == 1, errors
    assert "CollectiveError" not in errors and "kd_plugin/" not in errors, errors


# The main thread stays in C, without the lock of the interpreter, as in a collective of gloo that nobody answers.
STUCK = """
import ctypes
from kd_plugin.training.interrupt import one_line_end
with one_line_end(lambda what: f"{what}, that is all", several=False):
    print("stuck", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second call waits for ever, whatever signal comes
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_ctrl_c_ends_a_process_that_no_handler_reaches() -> None:
    with started([sys.executable, "-c", STUCK], until="stuck") as process:
        time.sleep(2)  # so that it is
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=8)  # less than the patience after one
    assert process.returncode == 130
    assert errors == "interrupted, that is all\n"


def test_ctrl_c_before_a_run_has_begun_is_one_line_too(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stop) as stop, one_line_errors(verbose=False, exit_code=2):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_handlers_are_put_back_and_other_failures_pass_through() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), one_line_end(lambda what: what, several=False):
        assert last_step() is None
        reached(1, 2)
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        raise KeyError("of the run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_fails_because_of_the_signal_is_no_failure(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(Ended) as stop, one_line_end(lambda what: f"{what}!", several=True):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            raise RuntimeError("Connection closed by peer")
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capfd.readouterr().err == "interrupted!\n"
