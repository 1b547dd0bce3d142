"""All GPU figures in one bounded run: `bash benchmarks/gpu.sh [--minutes 7] [--out FOLDER]`.

The parts, in this order, each in a process of its own that is ended when its share of the remaining time is over:
the GPU tests; time, memory and gradient error of the loss; a profile of one call; a whole distillation step; FSDP2 on
two ranks. A part that lacks a package or fails is skipped by name. What was measured is kept, whenever the run ends:

- `gpu.jsonl`: one result a line, written as it comes; all other files are made from it after each part
- `gpu.md`: the tables, with targets
- `gpu_loss.csv`, `gpu_step.csv`: their numbers, unrounded
- `gpu_trace.json`: the profiler's trace of one call
- `gpu.log`: what the parts printed
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_report
from common import RESULTS

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "pydantic", "numpy")


class PartOfRun(NamedTuple):
    """A script, and its share of the time against those of the parts that follow."""

    name: str
    script: str
    share: float


PARTS = (
    PartOfRun("tests", "gpu_tests.py", 3),
    PartOfRun("loss", "gpu_loss.py", 7),
    PartOfRun("profile", "gpu_profile.py", 1.5),
    PartOfRun("step", "gpu_step.py", 2.5),
    PartOfRun("ranks", "gpu_ranks.py", 1.5),
)
_GRACE = 3.0  # seconds between a part's own limit and the end of its process


class Run:
    """Options, the clock and the folder of the results."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.out: Path = given.out or (RESULTS / ("quick" if given.quick else "gpu"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * given.minutes
        self.results = self.out / "gpu.jsonl"
        self.log = self.out / "gpu.log"
        for path in self.out.glob("gpu*"):
            path.unlink()

    def write(self, kind: str, **values: Any) -> None:
        """Append one result, and bring the other files up to date."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        gpu_report.write(self.out)

    def run(self, part: PartOfRun, seconds: float) -> None:
        """One part, for at most `seconds`."""
        print(f"gpu.py: {part.name}, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, str(HERE / part.script), "--device", self.given.device]
        command += ["--seconds", f"{seconds - _GRACE:.0f}", "--out", str(self.out)]
        command += ["--threads", str(self.given.threads), *(["--quick"] if self.given.quick else [])]
        begin, start = time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        with self.log.open("rb") as log:
            log.seek(start)
            state = outcome(code, log.read().decode(errors="replace"))
        self.write("part", name=part.name, state=state, seconds=round(time.monotonic() - begin))
        print(f"gpu.py: {part.name}: {state}", flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a part with all processes that it started; none if they have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def outcome(code: int | None, printed: str) -> str:
    """A part's end in words; of a failed one, the last lines that it printed, or the package that it lacks."""
    if code == 0:
        return "done"
    if code is None:
        return "stopped when its time was over; what it had measured is kept"
    last = [line.strip() for line in printed.splitlines() if line.strip()][-3:]
    if last and last[-1].startswith("ModuleNotFoundError"):
        return f"skipped: {last[-1].removeprefix('ModuleNotFoundError: ')}"
    return f"failed: {' / '.join(last)}"[:600]


def shares(parts: Sequence[PartOfRun], seconds: float) -> float:
    """Seconds of the first of `parts`."""
    return seconds * parts[0].share / sum(part.share for part in parts)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"Python": platform.python_version(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _printed("git", "-C", str(HERE), "rev-parse", "--short", "HEAD")
    if device == "cpu":
        return {"device": f"CPU, {platform.machine()}", **found}
    query = "--query-gpu=name,memory.total,driver_version,clocks.sm,power.limit"
    return {"device": _printed("nvidia-smi", query, "--format=csv,noheader"), **found}


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return " ".join(done.stdout.split())


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="bound of the whole run (default: 7)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process (default: 2)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; returns the exit code, 0 if at least one of them came to its end."""
    given = options(argv)
    run = Run(given)
    values = {"device": given.device, "quick": given.quick, "minutes": given.minutes}
    run.write("run", **values, machine=machine(given.device))
    parts = [part for part in PARTS if given.parts is None or part.name in given.parts]
    for index, part in enumerate(parts):
        seconds = shares(parts[index:], run.deadline - time.monotonic())
        if seconds > 2 * _GRACE:
            run.run(part, seconds)
        else:
            run.write("part", name=part.name, state="skipped: no time left", seconds=0)
    print((run.out / "gpu.md").read_text(encoding="utf-8"))
    states = [row["state"] for row in gpu_report.read(run.results) if row["kind"] == "part"]
    return 0 if "done" in states else 1


if __name__ == "__main__":
    raise SystemExit(main())
