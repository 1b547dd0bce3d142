"""Runs the sweep: `python -m tests.sweep [ROW ...]` writes `table.json`; exit code 1 where a row is a mismatch.

`python -m tests.sweep --labels` writes `kd_plugin/plugin/label_table.py` from it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tests.sweep.table import ROOT, all_rows, label_table, measured, read_table, summary, write_table

LABELS = ROOT / "kd_plugin" / "plugin" / "label_table.py"


def main(arguments: list[str]) -> int:
    """Run the command line."""
    if arguments[:1] == ["--labels"]:
        LABELS.write_text(label_table(read_table()), encoding="utf-8")
        return 0
    found: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    for row, entry in measured(arguments or all_rows()):
        found[row] = entry
        print(f"{time.perf_counter() - start:6.1f} s  {row}: {entry['verdict']}  {entry['reason']}", flush=True)
    faults = write_table(found)
    print(summary(read_table()))
    for fault in faults:
        print(f"MISMATCH {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
