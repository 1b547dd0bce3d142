"""One rank of a run that `estimate_time.py` measures: `kd.train`, and the clocks after every step."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

import kd_plugin as kd


class Clocks(logging.Handler):
    """Reads wall time and this process's processor time when a step is logged, which waits for its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[tuple[float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one reading."""
        if record.getMessage().startswith("step "):
            self.readings.append((time.perf_counter(), time.process_time()))


def main() -> int:
    """Train as the YAML file says that is the first argument; returns the exit code."""
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    clocks, logger = Clocks(), logging.getLogger("kd_plugin.training.loop")
    logger.setLevel(logging.INFO)
    logger.addHandler(clocks)
    kd.train(kd.load_config(str(path), []))
    rank = os.environ.get("RANK", "0")
    path.with_suffix(f".rank{rank}.json").write_text(json.dumps(clocks.readings), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
