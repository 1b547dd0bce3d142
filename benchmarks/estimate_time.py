"""The time that `kd-plugin estimate` tells against steps that are run: `python benchmarks/estimate_time.py [--quick]`.

Six runs of `kd.train` on the CPU in fresh processes, some of two ranks, on models of random weights in the sizes of the
quickstart's (SmolLM2-135M and 8 of its 30 layers) and of a wider pair with a larger vocabulary. A measured step is the
median over all steps but the first, from log line to log line. The estimate is made right before and right after the
run, with its number of threads, and averaged. Every rank has half of the threads, so that all runs have the same.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import Row, Target, emulates_bfloat16, markdown, options, publish, write_csv

from kd_plugin.estimate.account import estimate
from kd_plugin.estimate.step_time import StepTime
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import to_yaml

HERE = Path(__file__).parent
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 98304,
    "tie_word_embeddings": False,
}
QUICK = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK |= {"num_hidden_layers": 3, "vocab_size": 256}


@dataclass(frozen=True)
class Run:
    """One configuration that is estimated and run."""

    name: str
    dtype: str = "float32"
    ranks: int = 1
    sizes: str = "smollm2"
    layers: int = 8
    length: int = 512
    train: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] | None = None


RUNS = (
    Run("one process, fp32"),
    Run("one process, bf16", dtype="bfloat16"),
    Run("FSDP2, 2 ranks", ranks=2, length=256, train={"parallel": "fsdp"}),
    Run("ZeRO-3, 2 ranks", ranks=2, length=256, train={"parallel": "deepspeed"}),
    Run("accumulation 4, checkpointing", length=128, train={"gradient_accumulation_steps": 4}),
    Run("wider, vocabulary 98304", sizes="wide", layers=4, length=256),
)


def make_teacher(folder: Path, sizes: dict[str, Any]) -> Path:
    """A Llama of random weights with a tokenizer of single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=1024, bos_token_id=1, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def configuration(run: Run, folder: Path, steps: int) -> RunConfig:
    """The settings of `run` on the models and the text in `folder`."""
    train = {"micro_batch_size": 1, "tokens_per_step": None, "gradient_accumulation_steps": 1, **run.train}
    train |= {"max_steps": steps, "eval_sequences": 1, "learning_rate": 1e-5, "parallel": train.get("parallel", "auto")}
    train["activation_checkpointing"] = "checkpointing" in run.name
    return RunConfig.model_validate(
        {
            "teacher": {"model": str(folder / run.sizes), "dtype": run.dtype},
            "student": {"from_teacher": {"layers": run.layers}, "dtype": run.dtype},
            "data": {"train": str(folder / "text.txt"), "seq_len": run.length, "eval_fraction": 0.2},
            "train": train,
            "deepspeed": run.deepspeed,
            "log": {"output_dir": str(folder / "runs" / run.name), "every": 1, "tensorboard": False},
        }
    )


def launch(config: RunConfig, ranks: int, threads: int, folder: Path) -> tuple[float, float]:
    """Run `config`; returns the median seconds of its steps but the first by the clock, and of the processor.

    Raises:
        RuntimeError: the run has failed.
    """
    path = folder / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    worker = [str(HERE / "estimate_worker.py"), str(path), str(threads)]
    ranked = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *ranked, *worker], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{config.log.output_dir}: {done.stderr[-2000:]}")
    medians = []
    for rank in range(ranks):
        readings = json.loads(path.with_suffix(f".rank{rank}.json").read_text(encoding="utf-8"))
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(readings)]
        medians.append([statistics.median(values) for values in zip(*steps, strict=True)])
    return max(wall for wall, _ in medians), max(cpu for _, cpu in medians) / threads


def estimated(config: RunConfig, ranks: int) -> StepTime:
    """The estimate of this moment."""
    time = estimate(config, world_size=ranks, device="cpu").time
    assert time is not None
    return time


def with_hidden_wire(time: StepTime) -> float:
    """Seconds of a step that would gather and reduce while the models compute."""
    phases = {phase.name: phase for phase in time.phases}
    moved = phases.get("parameters and gradients")
    computing = sum(p.seconds for name, p in phases.items() if name.startswith(("teacher", "student")))
    return time.seconds - (0.0 if moved is None else min(moved.wire, computing))


def measure(run: Run, folder: Path, threads: int, steps: int) -> Row:
    """Estimate, run, and estimate again."""
    config = configuration(run, folder, steps)
    before = estimated(config, run.ranks)
    wall, cpu = launch(config, run.ranks, threads, folder)
    both = (before, estimated(config, run.ranks))
    seconds = statistics.mean(time.seconds for time in both)
    row = {"run": run.name, "estimate s": seconds, "step s": wall, "step / estimate": wall / seconds}
    row |= {"CPU s": cpu, "by CPU time": cpu / seconds}
    hidden = statistics.mean(map(with_hidden_wire, both)) if run.ranks > 1 else None
    row |= {"if the wire were hidden": hidden, "before / after": before.seconds / both[1].seconds}
    print(
        {name: value if isinstance(value, str) else value and round(value, 3) for name, value in row.items()},
        flush=True,
    )
    shares = [f"{p.name} {1e3 * p.seconds:.0f} ms" for p in before.phases]
    print("  " + ", ".join(shares), flush=True)
    return row


def targets(rows: Sequence[Row]) -> list[Target]:
    """The median and the worst of the runs, by the clock and by processor time."""
    off = {name: [max(row[name], 1 / row[name]) for row in rows] for name in ("step / estimate", "by CPU time")}
    clock, cpu = off.values()
    return [
        Target("median over the runs of how far off", 1.25, statistics.median(clock), statistics.median(cpu)),
        Target("the worst", 2.0, max(clock), max(cpu)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and publish; returns the exit code."""
    run = options(__doc__ or "", argv)
    threads = max(1, run.threads // 2)
    torch.set_num_threads(threads)
    every = [one for one in RUNS if one.dtype == "float32" or not emulates_bfloat16(run.device)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 2000, encoding="utf-8")
        for sizes, values in (("smollm2", SMOLLM2), ("wide", WIDE)):
            make_teacher(folder / sizes, values | QUICK if run.quick else values)
        for one in every:
            print(one.name, flush=True)
            small = {"layers": 2, "length": 16} if run.quick else {}
            rows.append(measure(replace(one, **small), folder, threads, 3 if run.quick else 6))
    write_csv(run, "estimate_time", rows)
    note = "" if len(every) == len(RUNS) else " Not in bf16, which this processor only emulates."
    about = f"{threads} thread(s) for each rank.{note} step / estimate: 1 is exact."
    publish(run, "estimate_time", [about, markdown([target.row() for target in targets(rows)]), markdown(rows)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
