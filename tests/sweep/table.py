"""The expected verdicts, `table.json`: one row for each class, made by `python -m tests.sweep`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("table.json")
ROOT = Path(__file__).parents[2]
_UNDERSTOOD = re.compile(r"(nothing|times [\d.]+(, soft-cap [\d.]+)?|plus a bias)$")
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
    plain = found.get("kind") == "nn.Linear" and found.get("calls") == 1 and not found.get("trains_after")
    known = found.get("labels") in ("shifted", "unshifted")
    return "equal" if plain and known and _UNDERSTOOD.match(found.get("after", "")) else "refused"


def write_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Write the rows found into the table -> faults, one a line. A mismatch is never written as expected."""
    table, kinds, faults = read_table(), all_rows(), []
    for row, entry in found.items():
        before = {key: table.get(row, {}).get(key) for key in ("verdict", "late")}
        entry = {"registered": kinds[row], **entry}
        for key, reason in (("verdict", "reason"), ("late", "late_reason")):
            if entry.get(key) == "mismatch":
                faults.append(f"{row}{' (late)' if key == 'late' else ''}: {entry[reason]}")
                entry[key] = before[key] if before[key] in ("equal", "refused") else ought(entry)
                entry[reason] = ""
        table[row] = entry
    table = {row: table[row] for row in kinds if row in table}
    lines = [f" {json.dumps(row)}: {json.dumps(entry, ensure_ascii=False)}" for row, entry in table.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # one line each
    return faults


def summary(table: dict[str, dict[str, Any]]) -> str:
    """How many rows have which verdict, with their weights at once and late."""
    at_once = Counter(entry["verdict"] for entry in table.values())
    late = Counter(entry["late"] for entry in table.values() if "late" in entry)
    told = (", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts)) for counts in (at_once, late))
    return "{} rows: {}; attached before their weights: {}".format(len(table), *told)


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
