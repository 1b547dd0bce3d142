"""The expected verdicts, `table.json`: one row for each class, made by `python -m tests.sweep`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("table.json")
ROOT = Path(__file__).parents[2]
EXPECTED = ("equal", "refused", "cannot be built")


def read_table() -> dict[str, dict[str, Any]]:
    """Row -> kind, verdict, reason, and the facts that `tests.sweep.verdict` found."""
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}


def all_rows() -> dict[str, str]:
    """Row -> kind, for every class of the installed transformers and every variant."""
    from tests.sweep.classes import class_kinds
    from tests.sweep.special import VARIANTS

    kinds = class_kinds()
    return {**kinds, **{row: kinds[name] for row, (name, _) in VARIANTS.items()}}


def measured(rows: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its verdict, reason and facts, from a process of its own; a crash costs one row."""
    left = list(rows)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    while left:
        command = [sys.executable, "-W", "ignore", "-m", "tests.sweep.worker", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield left.pop(0), json.loads(line)
        if left:
            reason = f"crash: its process ended with exit code {process.returncode}"
            yield left.pop(0), {"verdict": "mismatch", "reason": reason}


def ought(found: dict[str, Any]) -> str:
    """What a row that is a mismatch today should be: equal where scale, soft-cap or bias follow one linear head."""
    words = {"nothing", "times", "soft-cap", "plus", "a", "bias"}
    after = found.get("after", "").replace(",", " ").split()
    plain = found.get("kind") == "nn.Linear" and found.get("calls") == 1 and not found.get("trains_after")
    understood = bool(after) and all(word in words or word[0].isdigit() for word in after)
    known = found.get("labels") in ("shifted", "unshifted")
    return "equal" if plain and understood and known else "refused"


def write_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Write the rows found into the table -> faults, one a line. A mismatch is never written as expected."""
    table, kinds, faults = read_table(), all_rows(), []
    for row, entry in found.items():
        if entry["verdict"] not in EXPECTED:
            faults.append(f"{row}: {entry['reason']}")
            before = table.get(row, {}).get("verdict")
            entry = {**entry, "verdict": before or ought(entry), "reason": ""}
        table[row] = {"registered": kinds[row], **entry}
    table = {row: table[row] for row in kinds if row in table}
    lines = [f" {json.dumps(row)}: {json.dumps(entry, ensure_ascii=False)}" for row, entry in table.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # one line each
    return faults


def summary(table: dict[str, dict[str, Any]]) -> str:
    """How many rows have which verdict."""
    counts = Counter(entry["verdict"] for entry in table.values())
    return f"{len(table)} rows: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts))


def label_table(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a package can know of classes whose weights are not there: label convention, decoder inputs, logits.

    Keys are class names. `shifts` is None where neither convention gives the model's own loss; `decoder_inputs` is
    the first of the ways that give the model's own logits, None where there is none.
    """
    shifts = {"shifted": True, "unshifted": False}
    return {
        row: {
            "shifts": shifts.get(entry["labels"]),
            "decoder_inputs": (entry["decoder_inputs"] or [None])[0],
            "after_head": entry["after"],
            "trains_after_head": bool(entry["trains_after"]),
            "plain_head": entry.get("kind") == "nn.Linear" and entry["calls"] == 1,
        }
        for row, entry in table.items()
        if "labels" in entry and "," not in row
    }
