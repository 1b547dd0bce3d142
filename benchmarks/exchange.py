"""What crosses the wire for the heads, and how long it takes: `python benchmarks/exchange.py [--quick]`.

Forward and backward of a pair of heads under FSDP2 over gloo, fp32, forward_kl with cross-entropy and metrics, by
`distill.exchange`: seconds and counted bytes over the rows per rank, on 2 and 4 ranks of this machine. Ranks are
fresh processes; the modes of a launch run in turn, round after round. Then, from the formulas alone, the bytes up
to 1024 ranks. The break-even rows of two modes are where their formulas meet; whether the counted bytes change
sides there is checked on a small vocabulary, where few rows reach it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import Options, Row, Target, figure, markdown, median_ratio, options, publish, write_csv
from exchange_worker import PRODUCTS, VARIANTS, Job
from ranks import launch

from kd_plugin.exchange.cost import Head, logits_bytes, stats_bytes, weight_bytes

MODES = ("weight", "logits", "stats")
PAIRS = (("weight", "stats"), ("weight", "logits"), ("logits", "stats"))
LIMITS = {(2, 256): 0.55, (2, 1024): 0.61, (4, 256): 0.52}  # of stats / weight, by ranks and rows
COLORS = {"weight": "tab:gray", "logits": "tab:orange", "stats": "tab:blue"}
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Heads(NamedTuple):
    """Sizes of both heads; bytes per element as gathered, and of the gradient as reduced."""

    vocab: int
    student: int
    teacher: int
    item: int = 4
    reduced: int = 4


PAPER = {
    "SmolLM2-135M from SmolLM2-360M": Heads(49152, 576, 960, item=2),
    "Llama-3.2-1B from Llama-3-8B": Heads(128256, 2048, 4096, item=2),
}
PAPER_ROWS = 4096


def formula(mode: str, heads: Heads, ranks: int, rows: float) -> float:
    """Bytes that one rank receives per micro-batch under `distill.exchange: mode`."""
    student = Head(heads.vocab, heads.student, ranks, heads.item, heads.reduced)
    teacher = Head(heads.vocab, heads.teacher, ranks, heads.item)
    if mode == "weight":
        return weight_bytes(student, teacher)
    return (logits_bytes if mode == "logits" else stats_bytes)(student, teacher, rows, ranks=ranks)


def crossing(one: Callable[[float], float], other: Callable[[float], float]) -> float | None:
    """The positive number of rows at which two straight lines meet; None where they do not."""
    start, end = (one(x) - other(x) for x in (0.0, 1.0))
    return None if start == end or start / (start - end) <= 0 else start / (start - end)


def break_even(pair: tuple[str, str], heads: Heads, ranks: int) -> float | None:
    """Rows per rank from which the first of the pair receives less."""
    return crossing(*(partial(formula, mode, heads, ranks) for mode in pair))


def run_job(run: Options, heads: Heads, ranks: int, rows: Sequence[int], modes: Sequence[str]) -> list[Any]:
    """Run one launch; returns its lines, with the formula's bytes beside the counted ones.

    Raises:
        RuntimeError: the ranks failed, or the modes do not compute the same loss.
    """
    seconds = run.minutes * 60 / 8 / len(rows)
    threads = max(1, run.threads // ranks)
    job = Job(heads.vocab, heads.student, tuple(rows), tuple(modes), 2 if run.quick else 5, seconds, threads)
    print(f"W={ranks}, V={heads.vocab}, rows {', '.join(map(str, rows))}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = launch("exchange_worker", job, ranks, Path(folder))
    for line in lines:
        mode = line["mode"]
        line |= {"W": ranks, "V": heads.vocab}
        line["formula"] = formula(mode, heads, ranks, line["rows"]) if mode in MODES else None
    losses = {(line["rows"], round(line["loss"], 3)) for line in lines if line["mode"] != PRODUCTS}
    if len(losses) != len(rows):
        raise RuntimeError(f"the modes do not compute the same loss: {sorted(losses)}")
    return lines


def time_targets(lines: Sequence[Row]) -> list[Target]:
    """The targets about the time of stats / weight."""
    targets = []
    for (ranks, rows), limit in LIMITS.items():
        for rest in ("", *(f", {variant}" for variant in VARIANTS)):
            at = {line["mode"]: line["seconds"] for line in lines if (line["W"], line["rows"]) == (ranks, rows)}
            ratio = median_ratio(at.get(f"stats{rest}", ()), at.get(f"weight{rest}", ()))
            targets.append(Target(f"time of stats / weight, W={ranks}, {rows} rows{rest}", limit, ratio))
    return targets


def byte_targets(lines: Sequence[Row], small: Heads) -> list[Target]:
    """The targets about counted bytes: against the formulas, and on both sides of the small head's break-even."""
    off = [abs(line["bytes"] / line["formula"] - 1) for line in lines if line["formula"]]
    targets = [Target("counted bytes off the formula, worst point", 0.05, max(off, default=None))]
    here = {(x["W"], x["rows"], x["mode"]): x["bytes"] for x in lines if x["V"] == small.vocab}
    for ranks in dict.fromkeys(ranks for ranks, _, _ in here):
        below, above = around(break_even(PAIRS[0], small, ranks))
        for rows, low, high in ((below, "stats", "weight"), (above, "weight", "stats")):
            what = f"V={small.vocab}, W={ranks}, {rows} rows: bytes of {low} / {high}"
            targets.append(Target(what, 1.0, here[ranks, rows, low] / here[ranks, rows, high]))
    return targets


def around(rows: float | None) -> tuple[int, int]:
    """Whole numbers a little below and a little above `rows`."""
    assert rows is not None
    return int(0.93 * rows), int(1.07 * rows) + 1


def time_table(lines: Sequence[Row]) -> list[Row]:
    """The table of times and bytes, with one line per number of ranks and of rows."""
    table = []
    for ranks, rows in dict.fromkeys((line["W"], line["rows"]) for line in lines):
        here = {line["mode"]: line for line in lines if (line["W"], line["rows"]) == (ranks, rows)}
        row: dict[str, Any] = {"W": ranks, "rows per rank": rows}
        row |= {f"{mode}, ms": statistics.median(here[mode]["seconds"]) * 1e3 for mode in MODES}
        row |= {f"{mode}, MB": here[mode]["bytes"] / 1e6 for mode in MODES}
        row["stats / weight"] = median_ratio(here["stats"]["seconds"], here["weight"]["seconds"])
        if PRODUCTS in here:
            row["products / weight"] = median_ratio(here[PRODUCTS]["seconds"], here["weight"]["seconds"])
        row["rounds"] = len(here["stats"]["seconds"])
        table.append(row)
    return table


def paper_table() -> list[Row]:
    """Bytes and break-even rows of the models in `PAPER`, from the formulas."""
    return [
        {
            "heads": name,
            "W": ranks,
            **{f"{mode}, MB": formula(mode, heads, ranks, PAPER_ROWS) / 1e6 for mode in MODES},
            **{f"{low} below": break_even((top, low), heads, ranks) for top, low in PAIRS[:2]},
        }
        for name, heads in PAPER.items()
        for ranks in RANKS
    ]


def _plot_measured(run: Options, name: str, lines: Sequence[Row], heads: Heads) -> None:
    worlds = list(dict.fromkeys(line["W"] for line in lines))
    with figure(run, name, panels=2 * len(worlds), size=(4.2, 3.6)) as axes:
        for (ranks, what), axis in zip([(w, what) for what in ("ms", "MB") for w in worlds], axes, strict=True):
            for mode in MODES:
                here = [line for line in lines if (line["W"], line["mode"]) == (ranks, mode)]
                rows = [line["rows"] for line in here]
                times = [statistics.median(line["seconds"]) * 1e3 for line in here]
                style = "o-" if what == "ms" else "o"
                axis.plot(rows, times if what == "ms" else [h["bytes"] / 1e6 for h in here], style, color=COLORS[mode])
            if what == "MB":
                _draw_formulas(axis, heads, ranks, [line["rows"] for line in lines])
            axis.set(
                xscale="log", yscale="log", xlabel="rows per rank", ylabel=what, title=f"W={ranks}, V={heads.vocab}"
            )
            axis.grid(alpha=0.3)
        axes[0].legend(MODES, fontsize=8)


def _draw_formulas(axis: Any, heads: Heads, ranks: int, measured: Sequence[int]) -> None:
    meets = {pair: break_even(pair, heads, ranks) for pair in PAIRS}
    start, end = min(measured), 1.5 * max([*measured, *(rows for rows in meets.values() if rows is not None)])
    points = [start * (end / start) ** (i / 60) for i in range(61)]
    for mode in MODES:
        axis.plot(points, [formula(mode, heads, ranks, rows) / 1e6 for rows in points], color=COLORS[mode], lw=0.8)
    for (top, _), rows in meets.items():
        if rows is not None:
            axis.plot(rows, formula(top, heads, ranks, rows) / 1e6, "kx")
            axis.annotate(f"{rows:.0f}", (rows, formula(top, heads, ranks, rows) / 1e6), fontsize=7)


def _plot_paper(run: Options) -> None:
    with figure(run, "exchange_paper", panels=len(PAPER), size=(4.6, 3.6)) as axes:
        for axis, (name, heads) in zip(axes, PAPER.items(), strict=True):
            for mode in MODES:
                megabytes = [formula(mode, heads, ranks, PAPER_ROWS) / 1e6 for ranks in RANKS]
                axis.plot(RANKS, megabytes, "-", color=COLORS[mode], label=mode)
            meet = [(w, rows) for w in range(2, 1025) if (rows := break_even(PAIRS[0], heads, w)) and rows < PAPER_ROWS]
            if meet:
                axis.axvline(meet[0][0], color="k", lw=0.6, ls=":")
            axis.set(xscale="log", yscale="log", xlabel="ranks W", ylabel="MB per rank and micro-batch", title=name)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)


def sizes(quick: bool) -> tuple[Heads, Heads, dict[int, tuple[int, ...]], tuple[int, ...]]:
    """What is measured: the head of the times, a head with a small vocabulary, and the rows of each.

    The rows of the former are given by number of ranks.
    """
    if quick:
        return Heads(499, 16, 16), Heads(64, 16, 16), {2: (16, 64)}, (8,)
    return Heads(49152, 576, 576), Heads(4096, 576, 576), {2: (64, 256, 1024), 4: (64, 256)}, (64, 256, 4096)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    large, small, rows, small_rows = sizes(run.quick)
    lines: dict[Heads, list[Any]] = {large: [], small: []}
    for ranks, counts in rows.items():
        variants = (f"{mode}, {variant}" for variant in VARIANTS for mode in ("weight", "stats"))
        lines[large] += run_job(run, large, ranks, counts, (*MODES, *variants, PRODUCTS))
        both = (*small_rows, *around(break_even(PAIRS[0], small, ranks)))
        lines[small] += run_job(run, small, ranks, sorted(both), MODES)
    everything = [*lines[large], *lines[small]]
    columns = ("W", "V", "rows", "mode", "bytes", "formula", "loss")
    write_csv(
        run, "exchange", [{c: x[c] for c in columns} | {"s": statistics.median(x["seconds"])} for x in everything]
    )
    paper = paper_table()
    write_csv(run, "exchange_paper", paper)
    _plot_measured(run, "exchange", lines[large], large)
    _plot_measured(run, "exchange_small", lines[small], small)
    _plot_paper(run)
    meets = ", ".join(f"{break_even(PAIRS[0], large, ranks):,.0f} rows at W={ranks}" for ranks in rows)
    parts = [
        f"fp32, gloo on one machine, V={large.vocab}, D=E={large.student}; medians. By the formulas `stats` receives "
        f"less than `weight` up to {meets}. `products` are the four matrix products of a rank's rows by `torch.mm`, "
        "which no mode can avoid: below products / weight, stats / weight cannot fall.",
        markdown([target.row() for target in (*time_targets(lines[large]), *byte_targets(everything, small))]),
        "![](results/exchange.png)",
        markdown(time_table(lines[large])),
        f"**V={small.vocab}**, where the break-even rows (x) are few enough to be measured",
        "![](results/exchange_small.png)",
        markdown(time_table(lines[small])),
        f"**Received per rank and micro-batch of {PAPER_ROWS} rows, by the formulas** (bf16, gradients in fp32), and "
        "the rows per rank up to which `stats` and `logits` receive less than `weight`",
        "![](results/exchange_paper.png)",
        markdown(paper),
    ]
    publish(run, "exchange", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
