"""One process: the whole loop, its logged numbers, evaluation, export, bad settings."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kd_plugin as kd
from kd_plugin.data.documents import TrainBatches, eval_batches, load_datasets
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.engines.process_group import start_process_group
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.export import ExportError, export_student
from kd_plugin.training.finite import DivergedError
from kd_plugin.training.preflight import SetupError
from kd_plugin.training.run import TrainResult
from kd_plugin.training.schedule import learning_rate_at
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def result(folder: Path) -> TrainResult:
    return kd.train(run_config(folder, train={"parallel": "single"}))


def losses(result: TrainResult) -> list[float]:
    return [values["loss"] for values in result.history]


def dense_step(config: RunConfig, step: int) -> tuple[float, float]:
    """Soft and hard loss of one step before any update: whole batch, whole logits, plain PyTorch."""
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=config.train.seed)
    dataset, _ = load_datasets(config.data, load_tokenizer(config.teacher), -100, seed=config.train.seed)
    batches = TrainBatches(dataset, micro_batch_size=8, gradient_accumulation_steps=1, seed=config.train.seed)
    (batch,) = batches.step(step)
    with torch.no_grad():
        zs, zt = (model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    labels = batch.labels[:, 1:].flatten()
    valid, temperature = labels != -100, config.distill.temperature
    log_q, log_p = (F.log_softmax(z[valid] / temperature, dim=-1) for z in (zs, zt))
    soft = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return soft.item(), F.cross_entropy(zs[valid], labels[valid]).item()


def test_logged_losses_are_those_of_the_whole_step(folder: Path, result: TrainResult) -> None:
    soft, hard = dense_step(run_config(folder), 0)
    first = result.history[0]
    assert first["soft_loss"] == pytest.approx(soft, rel=1e-5)
    assert first["hard_loss"] == pytest.approx(hard, rel=1e-5)
    assert first["loss"] == pytest.approx(0.5 * soft + 0.5 * hard, rel=1e-5)


def test_training_lowers_the_loss_and_keeps_the_logged_rates(folder: Path, result: TrainResult) -> None:
    assert losses(result)[-1] < 0.9 * losses(result)[0]
    train = run_config(folder).train
    assert [values["lr"] for values in result.history] == [learning_rate_at(s, train) for s in range(1, 6)]
    assert result.after["perplexity"] < result.before["perplexity"]


def test_accumulation_1x8_equals_4x2(folder: Path, result: TrainResult) -> None:
    for size in (1, 4):
        other = kd.train(run_config(folder, f"micro{size}", train={"micro_batch_size": size, "export": False}))
        assert losses(other) == pytest.approx(losses(result), rel=1e-5)
        assert [v["grad_norm"] for v in other.history] == pytest.approx(
            [v["grad_norm"] for v in result.history], rel=1e-4
        )


def test_activation_checkpointing_recomputes_and_changes_nothing(
    folder: Path, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: dict[bool, int] = {}
    original = LlamaMLP.forward

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            calls[recompute] = calls.get(recompute, 0) + 1
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for recompute in (False, True):
        train = {"activation_checkpointing": recompute, "export": False}
        other = kd.train(run_config(folder, "recompute", train=train))
        assert losses(other) == pytest.approx(losses(result), rel=1e-5)
    assert calls[True] - calls[False] == 5 * 4 * 2  # steps x micro-batches x layers


def test_every_second_step_logged_covers_both_steps(folder: Path, result: TrainResult) -> None:
    other = kd.train(run_config(folder, "every2", log={"every": 2, "tensorboard": False}))
    assert [values["step"] for values in other.history] == [2, 4, 5]
    tokens = [values["valid_tokens"] for values in result.history]
    weighted = sum(n * loss for n, loss in zip(tokens[:2], losses(result)[:2], strict=True)) / sum(tokens[:2])
    assert other.history[0]["loss"] == pytest.approx(weighted, rel=1e-5)


RELOAD = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "kd_plugin" not in sys.modules
for folder, file in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    data = numpy.load(file)
    ids, labels = torch.from_numpy(data["ids"]), torch.from_numpy(data["labels"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    print(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten()).exp().item())
"""


def exported(folder: Path, *, tied: bool) -> tuple[TrainResult, Path]:
    """A run and its export, and a file with what was evaluated."""
    config = run_config(make_folder(folder, tied=tied))
    result = kd.train(config)
    _, dataset = load_datasets(config.data, load_tokenizer(config.teacher), -100, seed=config.train.seed)
    batches = list(eval_batches(dataset, num_sequences=4, micro_batch_size=2))
    arrays = {"ids": [b.input_ids for b in batches], "labels": [b.labels for b in batches]}
    np.savez(folder / "eval.npz", **{name: torch.cat(parts).numpy() for name, parts in arrays.items()})
    return result, folder / "eval.npz"


def test_exports_reload_without_the_plugin_and_predict_the_same(tmp_path: Path) -> None:
    runs = [exported(tmp_path / name, tied=name == "tied") for name in ("tied", "untied")]
    arguments = [str(path) for result, file in runs for path in (result.export_dir, file)]
    done = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, check=True)
    found = [float(line) for line in done.stdout.splitlines()]
    assert found == pytest.approx([result.after["perplexity"] for result, _ in runs], rel=1e-5)


def test_evaluation_in_larger_batches_finds_the_same(
    folder: Path, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set()
    forward = FsdpEngine.evaluate

    def watched(engine: FsdpEngine, inputs: Mapping[str, torch.Tensor], *, num_items: int) -> None:
        if inputs["input_ids"].shape[1] == 32:  # not the short ones that look whether documents stay apart
            sizes.add(len(inputs["input_ids"]))
        forward(engine, inputs, num_items=num_items)

    monkeypatch.setattr(FsdpEngine, "evaluate", watched)
    other = kd.train(run_config(folder, "batched", train={"max_steps": 1, "eval_micro_batch_size": 4}))
    assert sizes == {4}
    assert other.before == pytest.approx(result.before, rel=1e-5)


@pytest.mark.parametrize(
    "weights", [{"soft_weight": 0.0, "hard_weight": 1.0}, {"soft_weight": 1.0, "hard_weight": 0.0}]
)
def test_one_of_the_two_losses_alone_is_evaluated_all_the_same(folder: Path, weights: dict) -> None:
    distill = {"row_kernel": "eager", **weights}
    result = kd.train(run_config(folder, "alone", distill=distill, train={"max_steps": 2, "export": False}))
    assert result.after["perplexity"] == pytest.approx(math.exp(result.after["hard_loss"]))
    assert result.after["hard_loss"] > 1.0
    for name in ("kl_t1", "soft_loss"):
        assert (name in result.after) == bool(weights["soft_weight"])
    for name in ("soft_loss", "hard_loss"):  # what is not computed is not logged as 0
        assert all((name in values) == bool(weights[name.replace("loss", "weight")]) for values in result.history)


def test_evaluation_measures_plain_losses_whatever_is_optimised(folder: Path, result: TrainResult) -> None:
    terms = [{"name": "forward_kl", "temperature": 3.0}]
    distill = {"row_kernel": "eager", "label_smoothing": 0.3, "z_loss_weight": 0.1, "terms": terms}
    other = kd.train(run_config(folder, "plain", distill=distill, train={"max_steps": 1, "export": False}))
    assert other.before["soft_loss"] == pytest.approx(other.before["kl_t1"], rel=1e-5)
    for name in ("hard_loss", "perplexity", "kl_t1"):
        assert other.before[name] == pytest.approx(result.before[name], rel=1e-5)
    assert other.history[0]["hard_loss"] > result.history[0]["hard_loss"]  # smoothing is trained with


def test_a_run_that_diverges_exports_nothing_and_says_so(folder: Path) -> None:
    config = run_config(folder, "diverged", train={"learning_rate": 1e38, "warmup_steps": 0})
    with pytest.raises(DivergedError, match=r"diverged at step 2 .* nan.* lower train\.learning_rate"):
        kd.train(config)
    left = {path.name for path in (folder / "diverged").iterdir()}
    assert left == {"config.yaml", "metrics.jsonl"}


def test_weights_that_are_not_numbers_are_not_exported(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = math.nan
    engine = SimpleNamespace(full_state_dict=model.state_dict)
    place = start_process_group(60)
    try:
        with pytest.raises(ExportError, match="1 of the student's tensors hold NaN or infinity, the first is weight"):
            export_student(engine, lambda: model, None, tmp_path / "export", dtype=torch.float32)
    finally:
        place.close()
    assert list(tmp_path.iterdir()) == []


def test_saving_is_no_part_of_a_step_s_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = time.perf_counter, [0.0]

    def slow_save(*_: object, **__: object) -> Path:
        now[0] += 60.0
        return folder

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + now[0])
    monkeypatch.setattr(checkpoint, "save", slow_save)
    train = {"max_steps": 3, "save_every": 1, "export": False}
    log = {"output_dir": str(folder / "saving"), "tensorboard": False, "every": 3}
    (window,) = kd.train(run_config(folder, train=train, log=log)).history
    assert window["step_time_ms"] < 10_000.0, "two saves in three steps would add 40 000"


def test_faults_are_told_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_plugin.training.run.tokenizer_of", lambda *_: pytest.fail("loaded"))
    data = {"train": "missing.txt", "eval": "absent.txt"}
    with pytest.raises(SetupError, match=r"missing\.txt\n.*absent\.txt"):
        kd.train(run_config(folder, data=data))


def test_text_shorter_than_a_sequence_is_refused_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_plugin.training.run.load_teacher", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="seq_len"):
        kd.train(run_config(folder, data={"seq_len": 100_000}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_full_precision(folder: Path, result: TrainResult, dtype: str) -> None:
    student = {"from_teacher": {"layers": 2}, "dtype": dtype}
    other = kd.train(run_config(folder, dtype, student=student))
    assert losses(other) == pytest.approx(losses(result), rel=0.03)
    assert losses(other) != losses(result)


def test_settings_without_effect_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(
        folder,
        "idle",
        deepspeed={"zero_optimization": {"stage": 2}},
        train={"max_steps": 1, "keep_checkpoints": 3, "schedule": "constant", "min_lr_ratio": 0.5, "warmup_steps": 0},
        log={"output_dir": str(folder / "idle"), "tensorboard": False, "sample_tokens": 3},
    )
    with caplog.at_level(logging.INFO):
        kd.train(config)
    warned = {record.getMessage().split()[0] for record in caplog.records if record.levelname == "WARNING"}
    assert warned >= {"deepspeed", "train.keep_checkpoints", "train.min_lr_ratio", "log.sample_tokens"}


def test_the_saved_configuration_repeats_the_run(
    folder: Path, result: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    again = kd.load_config(result.output_dir / "config.yaml", [f"log.output_dir={folder / 'again'}"])
    assert losses(kd.train(again)) == losses(result)
    assert not [record for record in caplog.records if "has no effect" in record.getMessage()]


def test_report_shows_quality_time_memory_and_samples(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = {"output_dir": str(folder / "report"), "tensorboard": False, "sample_prompt": "the fox", "sample_tokens": 4}
    with caplog.at_level(logging.INFO):
        result = kd.train(run_config(folder, log=log, train={"max_steps": 2}))
    shown = caplog.text
    assert f"{result.before['perplexity']:.2f}" in shown and f"{result.after['perplexity']:.2f}" in shown
    for part in ("step 2/2 loss", "eta 0s", "wall time", "peak rss", "'the fox'", str(result.export_dir)):
        assert part in shown
