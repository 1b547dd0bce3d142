"""What a teacher that runs ahead of its student saves: `python benchmarks/teacher_ahead.py [--quick]`.

One optimizer step of eight micro-batches on the quickstart's models (teacher SmolLM2-135M-Instruct, student 8 of its 30
layers), sharded by FSDP2 over two gloo ranks of this machine. The teacher reads each micro-batch as the student does,
or several at once. Counted are the bytes that a rank receives, and measured the seconds that it waits for the
teacher's gathers, in steps in which each is waited for at once; wall times are of other steps, and so are peaks, which
the allocator's own record gives. All ways must have the same loss, bit for bit.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ahead_worker import Job
from common import Options, Row, Target, emulates_bfloat16, markdown, median_ratio, options, publish, write_csv
from ranks import launch

RANKS, MICRO_BATCHES = 2, 8
TOGETHER = (1, 2, 8)


def run_job(run: Options) -> tuple[Job, list[dict[str, Any]]]:
    """Run the launch; returns its job and lines.

    Raises:
        RuntimeError: the ranks failed, or the ways do not have the same loss.
    """
    dtype = "float32" if emulates_bfloat16("cpu") else "bfloat16"
    layers, tokens = (2, 16) if run.quick else (8, 256)
    rounds = 1 if run.quick else max(1, min(3, int(run.minutes / 1.5)))
    job = Job(dtype, layers, tokens, MICRO_BATCHES, TOGETHER, rounds, max(1, run.threads // RANKS))
    print(f"W={RANKS}, {MICRO_BATCHES} x {tokens} tokens, {dtype}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = launch("ahead_worker", job, RANKS, Path(folder))
    losses = {loss for line in lines for loss in line["loss"]}
    if len(losses) > 1:
        raise RuntimeError(f"the ways do not have the same loss: {sorted(losses)}")
    return job, lines


def targets(lines: Sequence[Row]) -> list[Target]:
    """What was promised, of the first line (as the student) and the last (all at once)."""
    first, last = lines[0], lines[-1]
    growth = min(last["peaks"]) - min(first["peaks"])
    return [
        Target(
            "gathers of the teacher, all at once / as the student",
            1 / MICRO_BATCHES,
            last["gathers"] / first["gathers"],
        ),
        Target(
            "time of gathering, all at once / as the student", 0.2, median_ratio(last["gather_s"], first["gather_s"])
        ),
        Target("time of a step, all at once / as the student", 1.0, median_ratio(last["seconds"], first["seconds"])),
        Target("growth of the peak / the hidden states of a step", 1.1, growth / last["hidden"]),
    ]


def table(lines: Sequence[Row]) -> list[Row]:
    """One line for each number of micro-batches at once."""
    return [
        {
            "micro-batches at once": line["together"],
            "gathers": line["gathers"],
            "received, MB": line["bytes"] / 1e6,
            "gathering, ms": statistics.median(line["gather_s"]) * 1e3,
            "teacher, ms": statistics.median(line["teacher_s"]) * 1e3,
            "step, ms": statistics.median(line["seconds"]) * 1e3,
            "step / as the student": median_ratio(line["seconds"], lines[0]["seconds"]),
            "peak, MiB": min(line["peaks"]) / 2**20,
            "rounds": len(line["seconds"]),
        }
        for line in lines
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    job, lines = run_job(run)
    rows = table(lines)
    write_csv(run, "teacher_ahead", rows)
    hidden = lines[0]["hidden"] / 2**20
    parts = [
        f"{job.micro_batches} micro-batches of 1 x {job.tokens} tokens, {job.dtype}, "
        f"{'quick models' if run.quick else 'the quickstart models'}, FSDP2 over {RANKS} gloo ranks of one machine, "
        f"exchange {lines[0]['exchange']}. The hidden states of a step are {hidden:.3g} MiB. "
        "The losses of all lines are equal, bit for bit.",
        markdown([target.row() for target in targets(lines)]),
        markdown(rows),
    ]
    publish(run, "teacher_ahead", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
