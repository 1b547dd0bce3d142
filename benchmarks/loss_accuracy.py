"""Accuracy of the gradients in bf16, and two facts of the theory: `python benchmarks/loss_accuracy.py [--quick]`.

The case that counts is late in distillation: bf16 models, teacher close to the student (the same head, hidden
states 1 % apart), so that q - p is small beside both and whatever rounds the logits rounds the gradient away.
The oracle is the dense loss in fp64 on the very same bf16 inputs; the soft loss alone, because the
cross-entropy's gradient would hide the error.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import Case, make_tensors
from common import Options, Row, Target, figure, markdown, options, publish, write_csv
from contestants import errors, oracle_of
from torch import Tensor

import kd_plugin as kd

CONTESTANTS = {
    "kd_plugin": ("kd_plugin", {}),
    "kd_plugin, logits_dtype=input": ("kd_plugin", {"logits_dtype": "input"}),
    "Liger, compiled": ("Liger", {}),
    "Liger, eager": ("Liger eager", {}),
    "TRL": ("TRL", {}),
    "naive, bf16 products": ("naive", {}),
}
LIMIT = 0.005
CHUNKS = (1, 16, 256, 1024)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1000.0)


def close_teacher(base: Case, deviations: Sequence[float], divergences: Sequence[str]) -> list[Row]:
    """Measure the relative errors of dX and dW for every contestant, logit deviation and divergence."""
    rows: list[Row] = []
    for deviation in deviations:
        for divergence in divergences:
            case = replace(base, logit_std=deviation, divergence=divergence)
            tensors = make_tensors(case)
            oracle = oracle_of(case, tensors)
            for label, (name, changes) in CONTESTANTS.items():
                tensors.clear()
                error = errors(name, replace(case, **changes), tensors, oracle)
                rows.append(
                    {
                        "contestant": label,
                        "divergence": divergence,
                        "logit std": f"{deviation:g}",
                        "dX": error.hidden,
                        "dW": error.weight,
                    }
                )
            print(f"  {divergence}, logit std {deviation:g}", flush=True)
    return rows


def wide(rows: Sequence[Row]) -> list[Row]:
    """`rows` as a table with one line per contestant and `dX / dW` in per cent per setting."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["contestant"], {"error of dX / dW, %": row["contestant"]})
        line[f"{row['divergence']}, std {row['logit std']}"] = f"{100 * row['dX']:.3g} / {100 * row['dW']:.3g}"
    return list(lines.values())


def over_chunks(base: Case) -> list[Row]:
    """Measure the error of dW as it is accumulated over more and more chunks of the same rows.

    The teacher is an unrelated one, so that it is the accumulation that shows, not the logits' rounding.
    """
    tensors = make_tensors(base)
    oracle = oracle_of(base, tensors)
    rows: list[Row] = []
    for count in CHUNKS:
        case = replace(base, chunk_size=max(1, base.rows // count))
        row: dict[str, Any] = {"chunks": base.rows // (case.chunk_size or 1)}
        for label in ("kd_plugin", "Liger eager"):
            tensors.clear()
            row[f"{label}, dW error in %"] = 100 * errors(label, case, tensors, oracle).weight
        rows.append(row)
    return rows


def hinton(table: dict[str, Any]) -> tuple[list[Row], float]:
    """Compute T^2 KL and T^2 soft cross-entropy as T grows, their gradients, and the limit they tend to.

    The limit is the squared distance of the centred logits / (2 V), with gradient (centred difference) / V.
    """
    student, teacher = table["S"], table["T"]
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    vocab = student.shape[-1]
    limit = float(difference.square().sum(-1).mean()) / (2 * vocab)
    limit_gradient = difference / vocab / len(student)

    def run(name: str, temperature: float) -> tuple[float, Tensor]:
        leaf = student.clone().requires_grad_()
        config = kd.DistillConfig(
            divergence=name, temperature=temperature, soft_weight=1.0, hard_weight=0.0, row_kernel="eager"
        )
        loss = kd.distill_logits(leaf, teacher, config=config).loss
        return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]

    rows: list[Row] = []
    for temperature in TEMPERATURES:
        kl, kl_gradient = run("forward_kl", temperature)
        soft_ce, ce_gradient = run("soft_ce", temperature)
        log_p = (teacher / temperature).log_softmax(-1)
        entropy = temperature**2 * float(-(log_p.exp() * log_p).sum(-1).mean())
        rows.append(
            {
                "T": temperature,
                "T^2 KL": kl,
                "(T^2 KL - limit) / limit": kl / limit - 1,
                "gradient's distance to the limit's": float(
                    (kl_gradient - limit_gradient).norm() / limit_gradient.norm()
                ),
                "T^2 soft CE - T^2 KL - T^2 entropy of p": soft_ce - kl - entropy,
                "distance of CE's gradient to KL's": float((ce_gradient - kl_gradient).norm()),
            }
        )
    return rows, limit


def shares() -> list[Row]:
    """The class that the loss looks at: absolute shares of the terms of cross-entropy and of KL, in per cent."""
    p = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64)
    q = torch.tensor([0.979, 0.02, 0.001], dtype=torch.float64)
    terms = {"CE: -p log q": -p * q.log(), "KL: p log(p/q)": p * (p / q).log()}
    rows = []
    for name, values in terms.items():
        part = 100 * values.abs() / values.abs().sum()
        rows.append({"share in %": name, **{f"class {i}": f"{float(x):.2f}" for i, x in enumerate(part)}})
    return rows


def _plot(run: Options, rows: Sequence[Row], limit: float, accuracy: Sequence[Row]) -> None:
    with figure(run, "hinton_limit", panels=2, size=(5.0, 3.6)) as (left, right):
        temperatures = [row["T"] for row in rows]
        left.semilogx(temperatures, [row["T^2 KL"] for row in rows], "o-", label="T^2 KL(p||q)")
        left.axhline(limit, color="grey", linestyle="--", label=f"centred logit matching: {limit:.6f}")
        left.set(xlabel="temperature T", ylabel="loss, mean of 8 rows", title="Value")
        for key, label in (
            ("gradient's distance to the limit's", "KL to logit matching (relative)"),
            ("distance of CE's gradient to KL's", "soft CE to KL (absolute, 0 drawn as 1e-18)"),
        ):
            right.loglog(temperatures, [max(row[key], 1e-18) for row in rows], "o-", label=label)
        right.set(xlabel="temperature T", ylabel="distance of gradients", title="Gradient")
        for axis in (left, right):
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    with figure(run, "loss_accuracy", size=(7.5, 3.8)) as axis:
        settings = list(dict.fromkeys((row["divergence"], row["logit std"]) for row in accuracy))
        names = list(CONTESTANTS)
        for index, name in enumerate(names):
            heights = [100 * row["dW"] for row in accuracy if row["contestant"] == name]
            places = [place + (index - len(names) / 2) * 0.13 for place in range(len(settings))]
            axis.bar(places, heights, width=0.12, label=name)
        axis.axhline(100 * LIMIT, color="black", linestyle="--", linewidth=0.8)
        axis.set_xticks(range(len(settings)), [f"{name}\nstd {std}" for name, std in settings], fontsize=8)
        axis.set(yscale="log", ylabel="error of dW in %")
        axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def judge(accuracy: Sequence[Row], chunks: Sequence[Row], hinton_rows: Sequence[Row]) -> list[Target]:
    """The targets, with what was measured."""
    ours = [row for row in accuracy if row["contestant"] == "kd_plugin"]
    same_gradient = max(row["distance of CE's gradient to KL's"] for row in hinton_rows)
    errors_of_ours = [row["kd_plugin, dW error in %"] for row in chunks]
    return [
        Target("worst dX error of kd_plugin", LIMIT, max(row["dX"] for row in ours)),
        Target("worst dW error of kd_plugin", LIMIT, max(row["dW"] for row in ours)),
        Target(f"dW error, most / one chunk (of {CHUNKS})", 1.1, errors_of_ours[-1] / errors_of_ours[0]),
        Target("T = 1000: distance of T^2 KL to its limit", 1e-4, abs(hinton_rows[-1]["(T^2 KL - limit) / limit"])),
        Target("KL and soft CE: gradients apart", 1e-12, same_gradient),
        Target(
            "soft CE - KL - the teacher's entropy",
            1e-8,
            max(abs(row["T^2 soft CE - T^2 KL - T^2 entropy of p"]) for row in hinton_rows),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    base = Case(rows=256, vocab=32768, dtype="bfloat16", device=run.device, hard_weight=0.0, soft_weight=1.0)
    base = replace(base, teacher_noise=0.01)
    many = replace(base, rows=1024, vocab=8192, width=128, teacher_noise=None)
    settings: tuple[Sequence[float], Sequence[str]] = ((5.0, 30.0), ("forward_kl", "jsd", "reverse_kl"))
    if run.quick:
        base, many = replace(base, rows=32, vocab=1024, width=64), replace(many, vocab=256, width=32)
        settings = ((5.0,), ("forward_kl",))
    accuracy = close_teacher(base, *settings)
    chunks = over_chunks(many)
    table = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "reference_values.py"))
    limits, limit = hinton(table)
    for name, rows in (("loss_accuracy", accuracy), ("accuracy_over_chunks", chunks), ("hinton_limit", limits)):
        write_csv(run, name, rows)
    _plot(run, limits, limit, accuracy)
    parts = [
        f"bf16 inputs, V={base.vocab}, N={base.rows}, D={base.width}, teacher = student + 1 % noise, same head.",
        markdown([target.row() for target in judge(accuracy, chunks, limits)]),
        "![](results/loss_accuracy.png)",
        markdown(wide(accuracy)),
        f"**dW over more chunks** (bf16, unrelated teacher, N={many.rows}, V={many.vocab}, D={many.width})",
        markdown(chunks),
        "**Large temperatures turn KL into logit matching** (8 rows, V=4, fp64)",
        "![](results/hinton_limit.png)",
        markdown(limits, digits=7),
        "**Which class the loss looks at**, P=(0.98, 0.01, 0.01), Q=(0.979, 0.02, 0.001)",
        markdown(shares()),
    ]
    publish(run, "loss_accuracy", parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
