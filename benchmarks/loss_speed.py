"""Time of the loss and its gradients: `python benchmarks/loss_speed.py [--quick]`.

Before anything is timed, all contestants' losses and gradients are compared with an fp64 oracle on the same
tensors, so that nobody wins by computing something else.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cases import Case, make_tensors
from common import Options, Row, Target, emulates_bfloat16, figure, markdown, median_ratio, options, publish, write_csv
from contestants import errors, oracle_of, without_cross_entropy
from race import Entry, Outcome, race

from kd_plugin.settings.distill import BUILT_IN

OURS, FLOOR = "kd_plugin", "GEMMs only"
PEERS = ("compiled naive", "Liger", "TRL")
DIVERGENCES = tuple(BUILT_IN)
MAX_ERROR = 1e-4  # fp32 contestants against fp64; they land near 1e-6


def compare(case: Case) -> list[Row]:
    """Errors of every contestant on one small case. Raises `RuntimeError` when one computes something else."""
    rows = []
    for name in (OURS, *PEERS):
        their_case = without_cross_entropy(case) if name == "TRL" else case
        tensors = make_tensors(their_case)
        error = errors(name, their_case, tensors, oracle_of(their_case, tensors))
        rows.append({"contestant": name, "loss": error.loss, "dX": error.hidden, "dW": error.weight})
        if max(error) > MAX_ERROR:
            raise RuntimeError(f"{name} computes something else: errors {error} against fp64 on {their_case}")
    return rows


def head_race(run: Options, case: Case, share: float, profile: bool = True) -> tuple[Outcome, list[Row]]:
    """Race all contestants on one head, in fresh processes; returns the outcome and its table."""
    entries = [
        Entry(FLOOR, FLOOR, case),
        Entry(OURS, OURS, case),
        Entry("kd_plugin, metrics off", OURS, replace(case, metrics=False)),
    ]
    if case.dtype != "float32":
        entries.append(Entry("kd_plugin, logits_dtype=input", OURS, replace(case, logits_dtype="input")))
    entries += [Entry(name, name, case) for name in PEERS]
    names = [OURS] if profile and run.device == "cpu" else []
    outcome = race([[e] for e in entries], threads=run.threads, seconds=share * run.minutes * 60, profile=names)
    return outcome, [_line(outcome, entry.label, FLOOR) for entry in entries]


def _line(outcome: Outcome, label: str, base: str) -> Row:
    wall, base_wall = outcome.wall(label), outcome.wall(base)
    if not wall:
        return {"contestant": label, "ms": outcome.failed.get(label, "not run"), f"/ {base}": None, "rounds": 0}
    return {
        "contestant": label,
        "ms": statistics.median(wall),
        f"/ {base}": median_ratio(wall, base_wall),
        f"{OURS} / it": median_ratio(outcome.wall(OURS), wall),
        "CPU ms": statistics.median(outcome.cpu(label)),
        "loss": outcome.samples[label][0].loss,
        "rounds": len(wall),
    }


def variant_race(run: Options, case: Case, share: float) -> tuple[Outcome, list[Row]]:
    """Race kd_plugin on one head with itself: tokens ignored, another temperature, no gradient; one process."""
    variants = {
        "everything": case,
        "50 % ignored": replace(case, ignored=0.5),
        "90 % ignored": replace(case, ignored=0.9),
        "temperature 2": replace(case, temperature=2.0),
        "no_grad": replace(case, train=False),
    }
    entries = [Entry(label, OURS, variant) for label, variant in variants.items()]
    outcome = race([entries], threads=run.threads, seconds=share * run.minutes * 60)
    return outcome, [_variant_line(outcome, label, "everything") for label in variants]


def divergence_race(run: Options, case: Case, share: float) -> tuple[Outcome, list[Row]]:
    """Race every divergence of kd_plugin, with cross-entropy and metrics; one process."""
    entries = [Entry(name, OURS, replace(case, divergence=name)) for name in DIVERGENCES]
    outcome = race([entries], threads=run.threads, seconds=share * run.minutes * 60)
    return outcome, [_variant_line(outcome, name, "forward_kl") for name in DIVERGENCES]


def _variant_line(outcome: Outcome, label: str, base: str) -> Row:
    wall = outcome.wall(label)
    return {
        "case": label,
        "ms": statistics.median(wall) if wall else outcome.failed.get(label, "not run"),
        f"/ {base}": median_ratio(wall, outcome.wall(base)),
        "rounds": len(wall),
    }


def targets(head: Outcome, variants: Outcome, divergences: Outcome) -> list[Target]:
    """The targets for fp32, with what was measured."""

    def target(what: str, limit: float, outcome: Outcome, above: str, below: str) -> Target:
        wall = median_ratio(outcome.wall(above), outcome.wall(below))
        return Target(what, limit, wall, median_ratio(outcome.cpu(above), outcome.cpu(below)))

    return [
        target("kd_plugin / the four GEMMs", 1.15, head, OURS, FLOOR),
        target("kd_plugin / compiled naive", 0.75, head, OURS, "compiled naive"),
        target("kd_plugin / Liger", 0.55, head, OURS, "Liger"),
        target("kd_plugin / TRL", 0.4, head, OURS, "TRL"),
        target("50 % ignored / nothing ignored", 0.55, variants, "50 % ignored", "everything"),
        target("no_grad / training", 0.6, variants, "no_grad", "everything"),
        target("temperature 2 / 1", 1.1, variants, "temperature 2", "everything"),
        *(
            target(f"{name} / forward_kl", 1.25, divergences, name, "forward_kl")
            for name in DIVERGENCES
            if name not in ("forward_kl", "uld")
        ),
    ]


def split_table(profiles: dict[str, dict[str, float]]) -> str:
    """The table of where kd_plugin's time goes, one column per head."""
    parts = next(iter(profiles.values()))
    rows = [{"ms": part, **{head: split[part] for head, split in profiles.items()}} for part in parts]
    return markdown(rows)


def _plot(run: Options, heads: dict[str, list[Row]]) -> None:
    with figure(run, "loss_speed", panels=len(heads), size=(5.2, 3.4)) as axes:
        for axis, (title, rows) in zip(axes if isinstance(axes, list) else [axes], heads.items(), strict=True):
            timed = [row for row in rows if row["rounds"]][::-1]
            bars = axis.barh(
                [row["contestant"] for row in timed],
                [row["ms"] for row in timed],
                color=["tab:blue" if row["contestant"].startswith(OURS) else "silver" for row in timed],
            )
            axis.bar_label(bars, [f" {row[f'/ {FLOOR}']:.2f}x" for row in timed])
            axis.set(title=title, xlabel="ms per loss and gradients")
            axis.margins(x=0.15)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    case = Case(device=run.device)
    qwen = Case(rows=512, vocab=151936, width=256, device=run.device)
    if run.quick:
        case = replace(case, rows=96, vocab=1000, width=32, loss_memory_mb=0.4)
        qwen = replace(qwen, rows=64, vocab=3000, width=16, loss_memory_mb=1)
    equal = compare(replace(case, rows=64, ignored=0.25, temperature=2.0))
    short = replace(case, rows=min(case.rows, 512))
    races: dict[str, Any] = {}
    jobs = (
        ("fp32", f"fp32, N={case.rows}, V={case.vocab}", partial(head_race, run, case, 0.3)),
        ("bf16", "bf16, the same", partial(head_race, run, replace(case, dtype="bfloat16"), 0.2)),
        ("wide", f"fp32, V={qwen.vocab}, D={qwen.width}, N={qwen.rows}", partial(head_race, run, qwen, 0.15, False)),
        ("variants", "", partial(variant_race, run, case, 0.15)),
        ("divergences", "", partial(divergence_race, run, short, 0.2)),
    )
    left_out = {"bf16", "wide"} if run.quick else {"bf16"} if emulates_bfloat16(run.device) else set()
    for name, title, job in jobs:
        if name in left_out:
            continue
        print(f"{name} {title}", flush=True)
        races[name] = (title, *job())
        write_csv(run, f"loss_speed_{name}", races[name][2])
    heads = {title: rows for name, (title, _, rows) in races.items() if title}
    _plot(run, heads)
    judged = targets(races["fp32"][1], races["variants"][1], races["divergences"][1])
    profiles = {races[name][0]: races[name][1].profiles.get(OURS) for name in ("fp32", "bf16") if name in races}
    profiles = {title: split for title, split in profiles.items() if split}
    parts = [markdown([target.row() for target in judged]), "![](results/loss_speed.png)"]
    for title, rows in heads.items():
        parts += [f"**{title}**", markdown(rows)]
    parts += ["Not in bf16, which this processor only emulates."] if left_out == {"bf16"} else []
    parts += ["**Where kd_plugin's time goes** (under a profiler)", split_table(profiles)] if profiles else []
    parts += [f"**kd_plugin, fp32, N={case.rows}**", markdown(races["variants"][2])]
    parts += [f"**kd_plugin's divergences, fp32, N={short.rows}**", markdown(races["divergences"][2])]
    parts += ["**Relative errors against fp64 before the race** (fp32, T=2, a quarter ignored)", markdown(equal)]
    publish(run, "loss_speed", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
