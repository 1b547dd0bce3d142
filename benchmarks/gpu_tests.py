"""Part of `gpu.py`: the tests that need a GPU, in several processes where pytest-xdist is installed.

Only their folder is collected: other tests import what a bare GPU machine lacks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from gpu_part import part

ROOT = Path(__file__).parents[1]
_PROCESSES = 8  # each has a CUDA context of its own
_RESULT = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED)(?:\s|$)")


def main() -> int:
    """Run them; what is not done in time is counted as such."""
    options = part(__doc__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/gpu",
        "-v",
        "--tb=short",
        "-rN",
        "-p",
        "no:cacheprovider",
    ]
    if options.device != "cpu" and find_spec("xdist") is not None:
        command += ["-n", str(min(_PROCESSES, os.cpu_count() or 1))]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts: Counter[str] = Counter()
    assert run.stdout is not None
    for line in run.stdout:
        print(line, end="", flush=True)
        if "::" in line and (match := _RESULT.search(line)):
            counts[match[1].lower()] += 1
            options.emit("tests", key="gpu", **counts)
    code = run.wait()
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
