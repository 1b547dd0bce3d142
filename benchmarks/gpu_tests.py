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

from gpu_part import Part, part

ROOT = Path(__file__).parents[1]
_PROCESSES = 8  # each has a CUDA context of its own
_RESULT = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED)(?:\s|$)")
_DONE = (0, 1)  # exit codes of a run that came to its end, with or without failures


def run(options: Part, processes: int) -> int:
    """Run them, counting as they end; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "--tb=short", "-rN"]
    command += ["-p", "no:cacheprovider", "-p", "timeout"]
    command += ["-p", "xdist", "-n", str(processes)] if processes > 1 else []
    # Of what a machine's other plugins warn, our filter of warnings would make errors.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    pytest = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    counts: Counter[str] = Counter()
    assert pytest.stdout is not None
    for line in pytest.stdout:
        print(line, end="", flush=True)
        if "::" in line and (match := _RESULT.search(line)):
            counts[match[1].lower()] += 1
            options.emit("tests", key="gpu", **counts)
    return pytest.wait()


def main() -> int:
    """Run them; those that are not done in time are missing from the count."""
    options = part(__doc__)
    several = find_spec("xdist") is not None and options.device != "cpu"
    processes = min(_PROCESSES, os.cpu_count() or 1) if several else 1
    code = run(options, processes)
    if code not in _DONE and processes > 1:
        options.skip("GPU tests in several processes", f"pytest ended with {code}; once more in one process")
        code = run(options, 1)
    if code not in _DONE:
        raise RuntimeError(f"pytest ended with {code}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
