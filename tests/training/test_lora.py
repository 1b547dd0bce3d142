"""`student.lora` in `kd.train`: the steps, what a checkpoint holds, what is exported."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

import kd_plugin as kd
from kd_plugin.data.documents import TrainBatches, load_datasets
from kd_plugin.engines.protocol import EngineError
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.model_card import adapter_card, model_card
from kd_plugin.training.run import TrainResult
from kd_plugin.training.schedule import learning_rate_at
from tests.tiny_models import make_model
from tests.tiny_runs import curve, make_folder, make_teacher, run_config

LORA = {"r": 3, "lora_alpha": 12}
SAVED = {"max_steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, text, and a student of its own with dropout, so that random state matters."""
    folder = make_folder(tmp_path_factory.mktemp("tiny"))
    make_teacher(folder / "student", layers=2, dropout=0.1)
    return folder


def config_of(folder: Path, name: str, *, lora: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    student = {"from_teacher": None, "model": str(folder / "student"), "lora": LORA if lora is None else lora}
    sections["student"] = student | sections.get("student", {})
    return run_config(folder, name, **sections)


@pytest.fixture(scope="module")
def result(folder: Path) -> TrainResult:
    return kd.train(config_of(folder, "run"))


def exported(result: TrainResult) -> dict[str, Tensor]:
    assert result.export_dir is not None
    return load_file(result.export_dir / "model.safetensors")


def densely(config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and merged weights by hand, in fp64: W + (alpha / r) B A, whole logits, AdamW on A and B."""
    assert config.student.lora is not None and isinstance(config.student.model, str)
    teacher = load_teacher(config.teacher).double()
    adapted = build_student(config.student, teacher, seed=config.train.seed)
    weights = {name.replace(".base_layer", ""): p.detach().double() for name, p in adapted.named_parameters()}
    factors = {name: weights.pop(name).requires_grad_() for name in list(weights) if ".lora_" in name}
    plain = type(adapted)(adapted.config).double().eval()
    scale = config.student.lora.lora_alpha / config.student.lora.r

    def merged() -> dict[str, Tensor]:
        now = dict(weights)
        for name, down in factors.items():
            if ".lora_A." in name:
                up = factors[name.replace("lora_A", "lora_B")]
                place = name.replace(".lora_A.default", "")
                now[place] = weights[place] + scale * up @ down
        return now

    dataset, _ = load_datasets(config.data, load_tokenizer(config.teacher), -100, seed=config.train.seed)
    batches = TrainBatches(dataset, micro_batch_size=8, gradient_accumulation_steps=1, seed=config.train.seed)
    train, losses = config.train, []
    optimizer = torch.optim.AdamW(factors.values(), betas=train.adam_betas, eps=train.adam_eps, weight_decay=0.0)
    for step in range(1, train.max_steps + 1):
        (batch,) = batches.step(step - 1)
        loss = dense_loss(plain, merged(), teacher, batch.input_ids, batch.labels, config.distill)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), train.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, train)
        optimizer.step()
    return losses, {name: value.detach() for name, value in merged().items()}


def dense_loss(
    plain: torch.nn.Module,
    weights: dict[str, Tensor],
    teacher: torch.nn.Module,
    ids: Tensor,
    labels: Tensor,
    distill: kd.DistillConfig,
) -> Tensor:
    zs = torch.func.functional_call(plain, weights, kwargs={"input_ids": ids}).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        zt = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
    targets, t = labels[:, 1:].flatten(), distill.temperature
    valid = targets != -100
    log_q, log_p = (F.log_softmax(z[valid] / t, dim=-1) for z in (zs, zt))
    soft = t**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return distill.soft_weight * soft + distill.hard_weight * F.cross_entropy(zs[valid], targets[valid])


def test_steps_and_export_are_those_of_two_factors_trained_by_hand(folder: Path) -> None:
    shutil.copytree(folder / "student", folder / "still")
    values = json.loads((folder / "still" / "config.json").read_text())
    (folder / "still" / "config.json").write_text(json.dumps({**values, "attention_dropout": 0.0}))
    config = config_of(folder, "oracle", data={"packing": "joined"}, student={"model": str(folder / "still")})
    losses, weights = densely(config)
    result = kd.train(config)
    assert curve(result) == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for name, value in exported(result).items():
        assert (value - weights[name]).abs().max() < 1e-4, name


def test_the_students_own_weights_are_exported_as_they_came_but_for_the_adapters(
    folder: Path, result: TrainResult
) -> None:
    before, after = load_file(folder / "student" / "model.safetensors"), exported(result)
    assert before.keys() == after.keys()
    for name, value in before.items():
        adapted = "_proj" in name
        assert torch.equal(value, after[name]) == (not adapted), name


@pytest.mark.slow
def test_the_export_loads_where_neither_kd_plugin_nor_peft_is(folder: Path, result: TrainResult) -> None:
    script = (
        "import sys; sys.modules['peft'] = sys.modules['kd_plugin'] = None\n"
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(result.export_dir)!r})\n"
        f"transformers.AutoTokenizer.from_pretrained({str(result.export_dir)!r})\n"
        "print(model(input_ids=torch.arange(3, 40)[None]).logits.double().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert torch.isfinite(torch.tensor(float(done.stdout)))


def test_the_adapter_beside_it_computes_the_same_on_its_base(folder: Path, result: TrainResult) -> None:
    import peft
    import transformers

    assert result.export_dir is not None
    place = result.export_dir / "adapter"
    assert {path.name for path in place.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    named = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder / "student")
    merged = transformers.AutoModelForCausalLM.from_pretrained(result.export_dir)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(place)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_layers_of_the_teacher_are_exported_merged_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = kd.train(run_config(folder, "cut", student={"lora": LORA}, train={"max_steps": 2}))
    assert result.export_dir is not None and not (result.export_dir / "adapter").exists()
    assert "the export has no folder adapter, as its base, layers of the teacher, has none" in caplog.text


def test_before_the_first_step_the_student_is_its_base(folder: Path, result: TrainResult) -> None:
    student = {"from_teacher": None, "model": str(folder / "student")}
    whole = kd.train(run_config(folder, "whole", student=student, train={"max_steps": 1, "export": False}))
    assert result.before == pytest.approx(whole.before, rel=1e-6)
    assert curve(result)[0] == pytest.approx(curve(whole)[0], rel=1e-6)
    assert curve(result, "grad_norm")[0] != pytest.approx(curve(whole, "grad_norm")[0], rel=0.1)


@pytest.mark.parametrize(
    ("train", "tolerance"), [({"activation_checkpointing": True}, 1e-6), ({"micro_batch_size": 4}, 1e-5)]
)
def test_recomputation_and_micro_batches_change_nothing(folder: Path, train: dict[str, Any], tolerance: float) -> None:
    lora = {**LORA, "target_modules": ["q_proj", "lm_head"]}
    name = "_".join(train)
    model = {"model": str(folder / "teacher")}  # which has no dropout
    first, second = (
        kd.train(config_of(folder, f"{name}{i}", lora=lora, student=model, train={**more, "export": False}))
        for i, more in enumerate(({}, train))
    )
    assert curve(second) == pytest.approx(curve(first), rel=tolerance)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.3}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}])
def test_resuming_continues_bit_for_bit(folder: Path, lora: dict[str, Any]) -> None:
    name = "saved_" + next(iter(lora))
    lora = {**LORA, **lora}
    whole = kd.train(config_of(folder, name, lora=lora, train=SAVED))
    weights = exported(whole)
    shutil.rmtree(whole.output_dir / "checkpoints" / "step_00000004")
    resumed = kd.train(config_of(folder, name, lora=lora, train={**SAVED, "resume": True}))
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:] and curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    again = exported(resumed)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    """The folder of a run that has a checkpoint of step 2."""
    return kd.train(config_of(folder, "held", train={"max_steps": 2, "save_every": 2, "export": False})).output_dir


def test_a_checkpoint_holds_adapters_and_no_weight_of_the_base(folder: Path, saved: Path) -> None:
    state = FileSystemReader(saved / "checkpoints" / "step_00000002" / "engine").read_metadata().state_dict_metadata
    of_model = [name for name in state if name.startswith("model.")]
    assert of_model and all(".lora_" in name for name in of_model)
    moments = {name.split(".", 2)[2].rpartition(".")[0] for name in state if name.startswith("optimizer.state.")}
    assert moments == {name.removeprefix("model.") for name in of_model}


def test_adapters_of_other_weights_are_not_continued_with(folder: Path, saved: Path) -> None:
    shutil.copytree(saved, folder / "moved")
    shutil.copytree(folder / "student", folder / "other")
    other = make_model("llama", seed=4, dtype=torch.float32, vocab_size=64, max_position_embeddings=128)
    other.save_pretrained(folder / "other")
    more = {"max_steps": 4, "save_every": 2, "export": False, "resume": True}
    with pytest.raises(EngineError, match=r"has adapters only.*others than those it was trained on.*student\.model"):
        kd.train(config_of(folder, "moved", student={"model": str(folder / "other")}, train=more))


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"lora": {**LORA, "r": 4}}, r"student\.lora\.r 3, now it is 4: set it back"),
        ({"lora": {**LORA, "target_modules": ["q_proj"]}}, r'target_modules "all-linear", now it is \["q_proj"\]'),
        ({"lora": None}, r"was written with student\.lora \{.*\}, now it is null"),
    ],
)
def test_other_adapters_are_not_continued_with(folder: Path, saved: Path, student: dict[str, Any], said: str) -> None:
    train = {"max_steps": 4, "save_every": 2, "export": False, "resume": True}
    config = config_of(folder, "held", student=student, train=train)
    with pytest.raises(checkpoint.CheckpointError, match=said):
        kd.train(config)


def test_the_best_adapters_are_exported(folder: Path) -> None:
    """A student that was its teacher gets worse."""
    train = {"max_steps": 3, "eval_every": 1, "export_best": "kl_t1", "schedule": "constant"}
    train |= {"warmup_steps": 0, "learning_rate": 1.0}
    best = kd.train(config_of(folder, "best", student={"model": str(folder / "teacher")}, train=train))
    assert best.step < 3
    train["max_steps"] = best.step
    direct = kd.train(config_of(folder, "direct", student={"model": str(folder / "teacher")}, train=train))
    assert best.after["kl_t1"] == pytest.approx(direct.after["kl_t1"], rel=1e-6)
    kept = FileSystemReader(best.output_dir / "best" / "engine").read_metadata().state_dict_metadata
    assert all(".lora_" in name for name in kept if name.startswith("model."))
    wanted = exported(direct)
    assert all((value - wanted[name]).abs().max() < 1e-6 for name, value in exported(best).items())


def test_adapters_train_in_half_precision_and_are_kept_whole(folder: Path, result: TrainResult) -> None:
    half = kd.train(config_of(folder, "half", student={"dtype": "bfloat16"}))
    assert curve(half) == pytest.approx(curve(result), rel=0.05)
    assert {value.dtype for value in exported(half).values()} == {torch.bfloat16}
    assert half.export_dir is not None
    adapter = load_file(half.export_dir / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_a_base_in_half_precision_trains_the_same_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 would round it in each gather."""
    student = {"dtype": "bfloat16", "model": str(folder / "teacher")}
    train = {"max_steps": 3, "export": False}
    narrow = kd.train(config_of(folder, "narrow", student=student, train=train))
    monkeypatch.setattr("kd_plugin.engines.fsdp_units.narrow_frozen", lambda *_: None)
    wide = kd.train(config_of(folder, "wide", student=student, train=train))
    assert curve(narrow) == curve(wide) and curve(narrow, "grad_norm") == curve(wide, "grad_norm")
    assert narrow.after == wide.after


def test_the_cards_say_lora(folder: Path) -> None:
    values = {"teacher": {"model": "owner/large"}, "student": {"model": "owner/small", "lora": LORA}}
    config = RunConfig.model_validate(values)
    numbers = {"perplexity": 2.0, "kl_t1": 1.0, "top1_agreement": 0.5}
    card, alone = model_card(config, numbers, numbers, step=7), adapter_card(config)
    said = "rank 3, alpha 12, on all-linear"
    assert f"Student: `owner/small`, trained by LoRA adapters ({said}), which are merged into it" in card
    assert "- lora\n" in card and "library_name: transformers" in card
    assert f"Adapters: {said}" in alone and "base_model: owner/small" in alone and "library_name: peft" in alone
    local = config.student.model_copy(update={"model": str(folder / "student")})
    assert "base_model" not in adapter_card(config.model_copy(update={"student": local})), "the teacher is not its base"
    assert adapter_card(RunConfig.model_validate({**values, "student": {"model": "owner/small"}})) == ""
