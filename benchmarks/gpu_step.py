"""Part of `gpu.py`: a whole distillation step against fine-tuning plus the teacher's forward.

Two models of random weights in the sizes of Qwen3-1.7B (student) and Qwen3-4B (teacher), 8 layers of each. A step is
forward, backward and AdamW. Fine-tuning is Hugging Face's own: the same model and batch, its loss on whole logits.
The teacher's forward is that of its backbone, without its head, under `no_grad`. Beside the measured step stands what
`kd-plugin estimate` says of a run with such steps, which casts its parameters once more than the plain loop here.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_part import Part, calls_within, device_times, part, peak_gib
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import kd_plugin as kd
from kd_plugin.estimate.account import estimate
from kd_plugin.settings.device_peaks import peaks_of
from kd_plugin.settings.run import RunConfig

STUDENT = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
TEACHER = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
COMMON = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 8}
QUICK_STUDENT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
QUICK_TEACHER = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
QUICK_COMMON = {"vocab_size": 256, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
BATCH, QUICK_BATCH = (4, 2048), (2, 16)
ESTIMATE = "kd-plugin estimate of the distillation step"
DISTILLATION, FINE_TUNING, TEACHER_FORWARD = "distillation step", "fine-tuning step", "teacher's backbone forward"
_SPLIT = ("student_ms", "teacher_ms", "loss_ms")


def make_model(sizes: dict[str, int], options: Part) -> Any:
    """A Qwen3 of random weights, in bf16 on a GPU; equal sizes get equal weights."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    return model.to(torch.float32 if options.device == "cpu" else torch.bfloat16)


def make_steps(options: Part) -> tuple[dict[str, Callable[[], Tensor | None]], Any]:
    """The three contestants as functions of nothing, and the plugin that one of them uses."""
    common, student, teacher = (
        (QUICK_COMMON, QUICK_STUDENT, QUICK_TEACHER) if options.quick else (COMMON, STUDENT, TEACHER)
    )
    distilled, plain = (make_model(common | student, options) for _ in range(2))
    wise = make_model(common | teacher, options).eval().requires_grad_(False)
    kernel = "eager" if options.device == "cpu" else "auto"
    plugin = kd.attach(distilled, wise, kd.DistillConfig(row_kernel=kernel))
    ids = torch.randint(0, common["vocab_size"], QUICK_BATCH if options.quick else BATCH, device=options.device)

    def training(model: Any) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> Tensor:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    @torch.no_grad()
    def teacher_forward() -> None:
        wise.base_model(input_ids=ids)

    steps = {DISTILLATION: training(distilled), FINE_TUNING: training(plain), TEACHER_FORWARD: teacher_forward}
    return steps, plugin


def measure(options: Part) -> None:
    """Rounds of all three, in turn, while the time lasts."""
    steps, plugin = make_steps(options)
    times: dict[str, list[float]] = {}
    peaks, calls = {}, {}
    for name, step in steps.items():
        step()  # compiles, and makes the optimizer's state
        first = device_times(step, options.device, calls=2)
        calls[name] = calls_within(first[1:], 0.05 if options.quick else 1.0, fewest=2, most=5)
        peaks[name] = peak_gib(step, options.device)
    for rounds in range(1, 6):
        for name, step in steps.items():
            times.setdefault(name, []).append(statistics.median(device_times(step, options.device, calls=calls[name])))
            values = {"rounds": rounds, "gib": peaks[name]}
            options.emit("step", key=name, part=name, ms=statistics.median(times[name]), **values)
        if options.left < 10:
            break
    plugin.metrics()
    steps[DISTILLATION]()
    metrics = plugin.metrics()  # of that step alone
    for name in _SPLIT:
        where = f"of the distillation step: {name.removesuffix('_ms')} forward"
        options.emit("step", key=where, part=where, ms=metrics.get(name), rounds=None, gib=None)
    compare_with_estimate(options, statistics.median(times[DISTILLATION]))
    rounds = zip(*times.values(), strict=True)
    ratios = [distillation / (tuning + teacher) for distillation, tuning, teacher in rounds]
    options.emit("step ratio", key="ratio", ratio=statistics.median(ratios))


def compare_with_estimate(options: Part, milliseconds: float) -> None:
    """Beside the measured step what `kd-plugin estimate` says of one like it, by the table of peaks on a GPU."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else None
    if name is not None and peaks_of(name) is None:
        options.skip(ESTIMATE, f"{name} is not in the table of peaks")
        return
    batch, length = QUICK_BATCH if options.quick else BATCH
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), options)
        rows = batch * (length - 1)
        found = estimate(config, rows=rows, device="cpu" if name is None else "cuda", gpu=name).time
    assert found is not None
    estimated = found.seconds * 1e3
    options.emit("step", key=ESTIMATE, part=ESTIMATE, ms=estimated, rounds=None, gib=None)
    for phase in found.phases:
        where = f"of the estimate: {phase.name}"
        options.emit("step", key=where, part=where, ms=phase.seconds * 1e3, rounds=None, gib=None)
    options.emit("step estimate", key="ratio", ratio=milliseconds / estimated, how=found.speeds.how)


def configuration(folder: Path, options: Part) -> RunConfig:
    """The settings of a run like the step that is measured; `folder` gets the models' configurations, no weights."""
    common, student, teacher = (
        (QUICK_COMMON, QUICK_STUDENT, QUICK_TEACHER) if options.quick else (COMMON, STUDENT, TEACHER)
    )
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    models = {}
    for side, sizes in (("student", student), ("teacher", teacher)):
        Qwen3Config(**common | sizes, tie_word_embeddings=True).save_pretrained(folder / side)
        models[side] = {"model": str(folder / side), "dtype": dtype}
    batch, length = QUICK_BATCH if options.quick else BATCH
    kernel = "eager" if options.device == "cpu" else "auto"
    train = {"micro_batch_size": batch, "tokens_per_step": None, "gradient_accumulation_steps": 1}
    train["max_grad_norm"] = None
    sections = {"distill": {"row_kernel": kernel}, "data": {"seq_len": length}, "train": train}
    return RunConfig.model_validate(models | sections)


def main() -> int:
    """Run everything; returns the exit code."""
    measure(part(__doc__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
