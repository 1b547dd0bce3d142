"""The tables of `gpu.py` from its `gpu.jsonl`: `python benchmarks/gpu_report.py FOLDER`. Needs no GPU and no torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Row, Target, markdown

FLOOR, OURS = "four products", "kd_plugin"
PEERS = ("compiled naive", "naive", "Liger", "Liger eager", "TRL")
_ERRORS = ("hidden_error", "weight_error")
_AUTOCAST = "fp32 under bf16 autocast"


class Results:
    """All lines of a run; of those with one key the last counts."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        latest: dict[Any, dict[str, Any]] = {}
        for index, line in enumerate(lines):
            latest[line["kind"], line.get("key", index)] = line
        self._lines = list(latest.values())

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind, in the order in which they first came."""
        return [line for line in self._lines if line["kind"] == kind]

    def points(self) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
        """(shape, tokens) -> contestant -> its row."""
        found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        for row in self.rows("loss"):
            found.setdefault((row["shape"], row["tokens"]), {})[row["contestant"]] = row
        return found


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `gpu.jsonl`; the last may be cut off where a process was killed while it wrote it."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def ratio(above: dict[str, Any] | None, below: dict[str, Any] | None, column: str = "ms") -> float | None:
    """One row's number over another's, where both have it."""
    if above is None or below is None or above.get(column) is None or not below.get(column):
        return None
    return above[column] / below[column]


def largest(values: Sequence[float | None]) -> float | None:
    """None where there is no number."""
    return max((value for value in values if value is not None), default=None)


def loss_targets(results: Results) -> list[Target]:
    """Of every point: kd_plugin against the products, against each peer, and against its own promise of memory."""
    targets = []
    for (shape, tokens), rows in results.points().items():
        ours, where = rows.get(OURS), f"{shape}, {tokens} tokens"
        targets.append(Target(f"time: kd_plugin / four products, {where}", 1.25, ratio(ours, rows.get(FLOOR))))
        for peer in PEERS:
            if peer in rows:
                targets.append(Target(f"time: kd_plugin / {peer}, {where}", 1.0, ratio(ours, rows[peer])))
                errors = largest([ratio(ours, rows[peer], column) for column in _ERRORS])
                targets.append(Target(f"gradient error: kd_plugin / {peer}, {where}", 1.05, errors))
        memory = None if ours is None or ours["gib"] is None else ours["gib"] / ours["promised_gib"]
        targets.append(Target(f"memory: kd_plugin's peak / what it promises, {where}", 1.15, memory))
    return targets


def other_targets(results: Results) -> list[Target]:
    """Of the step and of the two ranks."""
    step = next((row["ratio"] for row in results.rows("step ratio")), None)
    worst = largest([row["gradient_error"] for row in results.rows("ranks")])
    found = next((row["ratio"] for row in results.rows("step estimate")), None)
    off = None if found is None else max(found, 1 / found)
    return [
        Target("time: distillation step / (fine-tuning step + teacher's backbone forward)", 1.05, step),
        Target("time: distillation step against kd-plugin estimate, how many times off", 2.0, off),
        Target("two ranks: gradients of FSDP2 against one process, worst parameter", 1e-5, worst),
    ]


def loss_tables(results: Results) -> list[str]:
    """One for each shape and number of tokens; the variants stand below those they vary."""
    parts = []
    for (shape, tokens), rows in results.points().items():
        table: list[Row] = []
        for name, row in rows.items():
            of_floor, of_ours = ratio(row, rows.get(FLOOR)), ratio(rows.get(OURS), row)
            table.append(
                {
                    "contestant": name,
                    "ms": row["ms"],
                    "/ four products": of_floor,
                    "kd_plugin / it": of_ours,
                    "GiB": row["gib"],
                    "promised GiB": row["promised_gib"],
                    "dX error": row["hidden_error"],
                    "dW error": row["weight_error"],
                    "computes": row["computes"] if name.split(",")[0] != FLOOR else "the products",
                    "calls": row["calls"],
                }
            )
        parts += [f"**{shape}, {tokens} tokens**", markdown(table)]
    return parts


def close_table(results: Results) -> list[str]:
    """Errors where student and teacher nearly agree."""
    rows = results.rows("close")
    if not rows:
        return []
    table = [
        {"contestant": row["contestant"], "dX error": row["hidden_error"], "dW error": row["weight_error"]}
        for row in rows
    ]
    where = f"{rows[0]['shape']}, {rows[0]['tokens']} tokens"
    return [f"**Teacher = student + 1 % noise, KL alone, {where}**", markdown(table)]


def profile_tables(results: Results) -> list[str]:
    """Shares of one call, and its longest kernels, from which the shares can be checked."""
    rows = results.rows("profile")
    if not rows:
        return []
    parts = []
    for row in rows:
        table = [{"part": name, "ms": ms, "share": row["shares"].get(name)} for name, ms in row["ms"].items()]
        title = f"**row_kernel {row['row_kernel']}, {row['shape']}, {row['tokens']} tokens**"
        parts += [f"{title}; {row['unwatched_ms']:.3g} ms without the profiler", markdown(table)]
    if kernels := results.rows("kernels"):
        columns = ("row_kernel", "kernel", "counted_as", "ms")
        parts += ["**The longest kernels**", markdown([{name: row[name] for name in columns} for row in kernels])]
    return parts


def plain_table(results: Results, kind: str, columns: Sequence[str]) -> list[str]:
    """These columns of all rows of a kind."""
    rows = results.rows(kind)
    return [markdown([{column: row.get(column) for column in columns} for row in rows])] if rows else []


_LOSS_TEXT = f"""\
Shapes are student's width / teacher's width / vocabulary. Times are medians of CUDA events. *GiB* is the peak that
torch allocates during a call above its inputs, gradients included. Errors are relative, against fp64, of sampled rows
of the hidden states' gradient (dX) and of sampled token ids of the head's over all rows (dW).
"four products" are the bare `torch.mm` of both logits, in fp32, and of both gradients, on whole logits. All compute
`0.5 * KL(p, q) + 0.5 * CE` at temperature 1, and are compared with that in fp64; TRL has no cross-entropy, so that it
computes, and is compared with, `0.5 * KL(p, q)`. *{_AUTOCAST}*: fp32 hidden states and head of the student, as
Hugging Face's Trainer has them with `bf16=True`; fp64 sees the fp32 weights, so that their rounding counts."""


def page(results: Results) -> str:
    """The whole `gpu.md`."""
    run = next(iter(results.rows("run")), {})
    dry = run.get("device") == "cpu" or run.get("quick")
    sections = ["# kd_plugin on a GPU"]
    if dry:
        sections.append("**A dry run: its numbers mean nothing.**")
    sections.append("; ".join(f"{name}: {value}" for name, value in run.get("machine", {}).items()) + ".")
    sections += ["## Parts", *plain_table(results, "part", ("name", "state", "seconds"))]
    judged = [target.row() for target in (*loss_targets(results), *other_targets(results))]
    sections += ["## Targets", markdown(judged)]
    sections += _section(
        "Tests that need a GPU", plain_table(results, "tests", ("passed", "failed", "error", "skipped"))
    )
    loss = loss_tables(results)
    sections += _section("The loss", [_LOSS_TEXT, *loss, *close_table(results)] if loss else [])
    sections += _section("Profile of one call", profile_tables(results))
    sections += _section("A whole step", plain_table(results, "step", ("part", "ms", "gib", "rounds")))
    ranks = plain_table(results, "ranks", ("exchange", "gradient_error", "loss_error", "parameters"))
    sections += _section("Two ranks on one device, FSDP2 over gloo", ranks)
    skipped = [f"- {row['what']}: {row['reason']}" for row in results.rows("skipped")]
    sections += ["## Skipped", "\n".join(skipped) or "Nothing."]
    return "\n\n".join(sections) + "\n"


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"## {title}", *(parts or ["Not measured."])]


def write(folder: Path) -> None:
    """Make all tables of `folder` from its `gpu.jsonl`."""
    results = Results(read(folder / "gpu.jsonl"))
    (folder / "gpu.md").write_text(page(results), encoding="utf-8")
    for kind in ("loss", "step"):
        if rows := results.rows(kind):
            with (folder / f"gpu_{kind}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [c for c in rows[0] if c not in ("kind", "key")], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
