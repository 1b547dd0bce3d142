"""What the benchmarks share: options, the machine, tables and targets, and the files they end in."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
MOST_LOAD = 0.5  # above it, others take a noticeable part of the cores

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line of a benchmark says."""

    quick: bool
    minutes: float
    threads: int
    device: str
    out: Path
    load: float = 0.0
    """Number of processes, of everybody, that wanted a core in the minute before the start."""

    @property
    def published(self) -> bool:
        """Whether the README shows what this run writes."""
        return self.out == RESULTS


def options(description: str, argv: Sequence[str] | None = None) -> Options:
    """Read the command line. A quick run writes to results/quick, so that it never replaces real numbers."""
    import torch

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop adding rounds after about this long")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the results")
    given = parser.parse_args(argv)
    out = given.out or (RESULTS / "quick" if given.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    return Options(given.quick, given.minutes, given.threads, given.device, out, os.getloadavg()[0])


def machine(run: Options) -> str:
    """One line about the machine: processor, memory, threads, load, versions."""
    import torch

    versions = [f"{name} {_version(name)}" for name in ("torch", "liger-kernel", "trl")]
    parts = [_processor(run), f"{run.threads} threads", f"Python {platform.python_version()}", *versions]
    if run.device == "cpu":
        parts.append(torch.backends.cpu.get_cpu_capability())
        parts.append(f"load before the start {run.load:.1f} on {os.cpu_count()} cores")
    busy = run.device == "cpu" and run.load > MOST_LOAD
    return ", ".join(parts) + (". **The machine was busy: do not trust the times**" if busy else "")


def emulates_bfloat16(device: str) -> bool:
    """Whether bfloat16 is slower than float32 here; racing it would say nothing about processors that have it."""
    import torch

    from kd_plugin.training.precision import automatic_dtype

    return automatic_dtype(torch.device(device))[0] == "float32"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor(options: Options) -> str:
    import torch

    if options.device != "cpu":
        return torch.cuda.get_device_name()
    lines = _read(Path("/proc/cpuinfo"))
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    total = next((int(line.split()[1]) for line in _read(Path("/proc/meminfo")) if line.startswith("MemTotal")), 0)
    return f"{name or platform.processor() or platform.machine()}, {total / 2**20:.0f} GiB"


def _read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True)
class Target:
    """Something that was promised, beside what was measured."""

    what: str
    limit: float
    measured: float | None
    """None where it was not measured."""
    by_cpu: float | None = None
    """`measured` from processor time instead of wall time, for the reader of a busy machine's numbers."""

    @property
    def verdict(self) -> str:
        """Whether `measured` keeps to the limit, in words."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "not met"

    def row(self) -> Row:
        """The target as a row of a table."""
        row = {"target": self.what, "limit": f"<= {self.limit:g}", "found": self.measured, "verdict": self.verdict}
        return row if self.by_cpu is None else row | {"by CPU time": self.by_cpu}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Median over the rounds of above / below (what slows one round slows both); None without a round."""
    ratios = [one / other for one, other in zip(above, below, strict=False)]
    return statistics.median(ratios) if ratios else None


def text(value: Any, digits: int = 3) -> str:
    """The text of a table's cell: `digits` significant digits, - for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return str(value)


def markdown(rows: Sequence[Row], *, digits: int = 3) -> str:
    """`rows` as a Markdown table, with the columns of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(column), digits) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_csv(options: Options, name: str, rows: Sequence[Row]) -> None:
    """Write `rows` to `results/NAME.csv`, unrounded."""
    with (options.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def publish(options: Options, name: str, parts: Sequence[str]) -> None:
    """Write `results/NAME.md`, print it, and bring the README up to date."""
    import report

    body = "\n\n".join([*parts, f"Machine: {machine(options)}."]) + "\n"
    (options.out / f"{name}.md").write_text(body, encoding="utf-8")
    print(f"\n{body}\nwritten to {options.out}")
    if options.published:
        report.update_readme()


@contextmanager
def figure(options: Options, name: str, *, panels: int = 1, size: tuple[float, float] = (6.0, 3.6)) -> Iterator[Any]:
    """Give axes to draw on, one or a list of `panels`, and save them as `results/NAME.png`.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, panels, figsize=(size[0] * panels, size[1]), squeeze=False)
    yield axes[0][0] if panels == 1 else list(axes[0])
    canvas.tight_layout()
    canvas.savefig(options.out / f"{name}.png", dpi=110)
    pyplot.close(canvas)
