"""Faults that need nothing loaded, and settings without effect."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import early_problems, idle_settings
from kd_plugin.training.preflight_models import model_warnings


def config(tmp_path: Path, **sections: Any) -> RunConfig:
    """A run whose files exist, with `sections` merged over it."""
    (tmp_path / "teacher").mkdir(exist_ok=True)
    (tmp_path / "teacher" / "config.json").write_text("{}")
    values: dict[str, Any] = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"from_teacher": {"layers": 2}},
        "log": {"output_dir": str(tmp_path / "runs" / "x")},
    }
    for name, update in sections.items():
        values[name] = {**values.get(name, {}), **update}
    return RunConfig.model_validate(values)


def test_a_good_run_has_no_problem_and_no_idle_setting(tmp_path: Path) -> None:
    good = config(tmp_path)
    saved = RunConfig.model_validate(good.model_dump())  # every default spelt out
    assert early_problems(good) == [] and idle_settings(saved, "single") == []
    assert not (tmp_path / "runs").exists(), "asking makes nothing"


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = config(
        tmp_path,
        teacher={"model": "package:no_such_package", "tokenizer": "./nowhere"},
        student={"from_teacher": None, "model": "/no/such/model"},
        data={"train": "missing.txt", "eval": "absent.jsonl", "split": "test"},
        log={"output_dir": str(tmp_path / "file" / "run")},
        train={"parallel": "deepspeed"},
        deepspeed={"zero_optimisation": {}, "gradient_clipping": 7.0},
    )
    problems = early_problems(bad)
    for part in (
        "teacher.model: no installed package 'no_such_package'",
        "teacher.tokenizer: no such directory ./nowhere",
        "student.model: no such directory /no/such/model",
        "data.train: no such file or directory: missing.txt",
        "data.eval: no such file or directory: absent.jsonl",
        "data.split is 'test', but 'missing.txt' is no dataset name",
        f"log.output_dir: {tmp_path / 'file' / 'run'} cannot be made, {tmp_path / 'file'} is a file",
        "deepspeed.zero_optimisation is no key that DeepSpeed reads, did you mean 'zero_optimization'?",
        "deepspeed.gradient_clipping is 7.0 but train.max_grad_norm makes it 1.0; change",
    ):
        assert sum(part in line for line in problems) == 1, part
    assert len(problems) == 9 and not any("\n" in line for line in problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    (line,) = early_problems(config(tmp_path, log={"output_dir": str(locked / "run")}))
    assert "no permission" in line


def test_a_block_for_another_layout_is_no_problem_but_idle(tmp_path: Path) -> None:
    other = config(tmp_path, deepspeed={"gradient_clipping": 7.0})
    assert early_problems(other, mode="fsdp", world_size=2, accumulation=1) == []
    assert idle_settings(other, "fsdp") == ["deepspeed has no effect: train.parallel is fsdp"]
    assert len(early_problems(other, mode="deepspeed", world_size=2, accumulation=1)) == 1
    assert len(early_problems(other)) == 1, "launch/train_deepspeed.py would read it"


def test_groups_of_shards_must_divide_the_ranks(tmp_path: Path) -> None:
    grouped = config(tmp_path, train={"shard_size": 4})
    assert early_problems(grouped) == [], "the number of ranks is not known yet"
    assert early_problems(grouped, mode="fsdp", world_size=8, accumulation=1) == []
    assert early_problems(grouped, mode="single", world_size=1, accumulation=1) == []
    for mode in ("fsdp", "ddp"):
        (line,) = early_problems(grouped, mode=mode, world_size=6, accumulation=1)
        assert line == "train.shard_size is 4, wanted a divisor of the 6 ranks: set it to 1, 2, 3, 6 or null"


def test_fsdp1_has_no_groups_of_one(tmp_path: Path) -> None:
    alone = config(tmp_path, train={"shard_size": 1, "parallel": "fsdp1"})
    for mode in ("fsdp1", None):
        (line,) = early_problems(alone, mode=mode)
        assert "set train.parallel to ddp" in line
    assert early_problems(alone, mode="fsdp", world_size=2, accumulation=1) == []


def test_what_fsdp_does_is_not_asked_of_deepspeed(tmp_path: Path) -> None:
    both = {"train": {"shard_size": 2, "parallel": "deepspeed"}, "teacher": {"sharding": "replicate", "offload": True}}
    size, offload = early_problems(config(tmp_path, **both), mode="deepspeed", world_size=4, accumulation=1)
    assert "set deepspeed.zero_optimization.zero_hpz_partition_size" in size
    assert "set teacher.sharding to shard" in offload
    assert len(early_problems(config(tmp_path, **both))) == 2, "train.parallel says it before the launch does"
    both["teacher"]["sharding"] = "shard"
    assert len(early_problems(config(tmp_path, **both), mode="deepspeed", world_size=4, accumulation=1)) == 1


@pytest.mark.parametrize("block", [None, {"zero_optimization": {"stage": 3}}])
def test_layers_are_not_compiled_under_zero3(tmp_path: Path, block: dict[str, Any] | None) -> None:
    more = {} if block is None else {"deepspeed": block}
    compiled = config(tmp_path, train={"compile": True, "parallel": "deepspeed"}, **more)
    (line,) = early_problems(compiled)
    assert line.startswith("train.compile is true, but ZeRO-3") and "train.compile to false" in line
    assert early_problems(compiled, mode="deepspeed", world_size=2, accumulation=1) == [line]
    assert early_problems(config(tmp_path, train={"compile": True}, **more), mode="fsdp", world_size=2) == []
    lower = config(
        tmp_path,
        train={"compile": True, "parallel": "deepspeed"},
        deepspeed={"zero_optimization": {"stage": 2}},
    )
    assert early_problems(lower) == []


def test_deepspeed_that_is_not_installed_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else object())
    (line,) = early_problems(config(tmp_path, train={"parallel": "deepspeed"}))
    assert "pip install --no-build-isolation" in line


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys, kd_plugin.training.preflight\n"
    code += "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TERMS = [{"name": "forward_kl"}, {"name": "jsd", "beta": 0.3}]


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"data": {"text_column": "body"}}, ["data.text_column"]),
        ({"data": {"train": "a.txt", "text_column": "body"}}, ["data.text_column"]),
        ({"data": {"train": "a.jsonl", "text_column": "body"}}, []),
        ({"data": {"train": "a.txt", "eval": "b.jsonl", "text_column": "body"}}, []),
        ({"data": {"eval": "b.txt", "eval_fraction": 0.2}}, ["data.eval_fraction"]),
        ({"data": {"train": "hub/name", "eval_split": "test", "eval_fraction": 0.2}}, ["data.eval_fraction"]),
        ({"teacher": {"model": "package:x", "revision": "v1"}}, ["teacher.revision"]),
        ({"teacher": {"model": "some/model", "revision": "v1"}}, []),
        (
            {"student": {"revision": "v1", "gguf_file": "x", "trust_remote_code": True, "allow_pickle": True}},
            ["student.gguf_file", "student.allow_pickle", "student.revision", "student.trust_remote_code"],
        ),
        ({"student": {"revision": "v1", "tokenizer": "some/tokenizer"}}, []),
        ({"student": {"from_teacher": None, "from_config": {"x": 1}, "trust_remote_code": True}}, []),
        ({"distill": {"chunk_size": 64, "loss_memory_mb": 9}}, ["distill.loss_memory_mb"]),
        ({"distill": {"loss_memory_mb": 9}}, []),
        ({"distill": {"beta": 0.3}}, ["distill.beta"]),
        ({"distill": {"alpha": 0.3, "divergence": "jsd"}}, ["distill.alpha"]),
        ({"distill": {"beta": 0.3, "divergence": "jsd"}}, []),
        ({"distill": {"alpha": 0.3, "divergence": "skew_kl"}}, []),
        ({"distill": {"beta": 0.4, "terms": TERMS}}, ["distill.beta"]),
        ({"distill": {"beta": 0.4, "terms": [*TERMS, {"name": "jsd"}]}}, []),
        ({"distill": {"terms": [{"name": "tvd", "alpha": 0.3}]}}, ["distill.terms.0.alpha"]),
        ({"distill": {"temperature": 2.0, "terms": [{"name": "tvd", "temperature": 3.0}]}}, ["distill.temperature"]),
        ({"distill": {"temperature": 2.0, "soft_weight": 0.0}}, ["distill.temperature"]),
        ({"distill": {"temperature_power": 1.0}}, ["distill.temperature_power"]),
        ({"distill": {"temperature_power": 1.0, "temperature": 2.0}}, []),
        ({"train": {"keep_checkpoints": 3}}, ["train.keep_checkpoints"]),
        ({"train": {"schedule": "constant", "min_lr_ratio": 0.5}}, ["train.min_lr_ratio"]),
        ({"log": {"sample_tokens": 3}}, ["log.sample_tokens"]),
        ({"distill": {"exchange": "stats"}, "train": {"parallel": "single"}}, ["distill.exchange"]),
        ({"train": {"parallel": "single", "shard_size": 2}}, ["train.shard_size"]),
        ({"train": {"parallel": "ddp", "shard_size": 2}, "teacher": {"sharding": "replicate"}}, ["train.shard_size"]),
        ({"train": {"parallel": "ddp", "shard_size": 2}}, []),
        ({"train": {"shard_size": 2}, "teacher": {"offload": True}}, []),
    ],
)
def test_a_setting_without_effect_is_named(tmp_path: Path, sections: dict[str, Any], names: list[str]) -> None:
    found = idle_settings(config(tmp_path, **sections))
    assert [line.split()[0] for line in found] == names
    assert all(" has no effect: " in line for line in found)


def test_a_teacher_ahead_reads_whole_micro_batches(tmp_path: Path) -> None:
    def with_teacher(sequences: int, **sections: Any) -> RunConfig:
        run = config(tmp_path, train={"micro_batch_size": 4}, **sections)
        teacher = run.teacher.model_copy(update={"micro_batch_size": sequences})
        return run.model_copy(update={"teacher": teacher})

    assert early_problems(with_teacher(8)) == []
    (line,) = early_problems(with_teacher(6))
    assert line.startswith("teacher.micro_batch_size is 6, wanted a multiple of train.micro_batch_size, 4")
    (line,) = early_problems(with_teacher(2))
    assert "is 2, wanted a multiple" in line
    (idle,) = idle_settings(with_teacher(8, distill={"soft_weight": 0.0}), "single")
    assert idle == "teacher.micro_batch_size has no effect: distill.soft_weight is 0"


def with_model(tmp_path: Path, values: dict[str, Any], *, tables: dict[str, list[int]] | None = None) -> None:
    """A teacher of this configuration, whose weights have these shapes."""
    folder = tmp_path / "teacher"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: torch.zeros(shape) for name, shape in (tables or {}).items()}, folder / "model.safetensors")


LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}


def problems_of(tmp_path: Path, **sections: Any) -> list[str]:
    run = config(tmp_path, **{"data": {"seq_len": 32}, **sections}).model_dump()
    (tmp_path / "teacher" / "config.json").write_text((tmp_path / "kept.json").read_text())
    return early_problems(RunConfig.model_validate(run))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    with_model(tmp_path, {**LLAMA, "max_position_embeddings": 40, "vocab_size": 64}, tables={"a.weight": [3, 4]})
    (tmp_path / "kept.json").write_text((tmp_path / "teacher" / "config.json").read_text())
    return tmp_path


def test_layers_and_heads_that_a_config_json_shows_not_to_fit_are_named(llama: Path) -> None:
    assert problems_of(llama, student={"from_teacher": {"layers": 4}}) == []
    assert problems_of(llama, student={"from_teacher": {"layers": 9}}) == [
        "student.from_teacher.layers is 9, but the teacher has 4 layers: give a number from 2 to 4"
    ]
    fresh = {"from_teacher": None, "from_config": {"num_attention_heads": 6}}
    assert problems_of(llama, student=fresh) == [
        "student.from_config: num_attention_heads 6 is no multiple of num_key_value_heads 4; set both",
        "student.from_config: hidden_size 64 is no multiple of num_attention_heads 6; set both",
    ]
    fresh["from_config"] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert problems_of(llama, student=fresh) == []


def test_learnt_positions_are_a_fault_and_computed_ones_a_warning(tmp_path: Path) -> None:
    for tables, faults in (({"transformer.wpe.weight": [16, 4]}, 2), ({"model.norm.weight": [4]}, 0)):
        with_model(tmp_path, {"n_positions": 16, "n_layer": 4}, tables=tables)
        (tmp_path / "kept.json").write_text((tmp_path / "teacher" / "config.json").read_text())
        found = problems_of(tmp_path)
        assert len(found) == faults and all("16 positions, each of which it has learnt" in line for line in found)
        run = config(tmp_path, data={"seq_len": 32})
        (tmp_path / "teacher" / "config.json").write_text((tmp_path / "kept.json").read_text())
        warned = model_warnings(run)
        assert (
            warned == []
            if faults
            else [line.split("is beyond")[1] for line in warned]
            == [
                " the teacher's 16 positions",
                " the student's 16 positions",
            ]
        )


def test_tokens_that_the_student_lacks_are_a_warning(llama: Path) -> None:
    tokens = {"model": {"vocab": {"a": 0, "b": 62}}, "added_tokens": [{"id": 63}]}
    (llama / "teacher" / "tokenizer.json").write_text(json.dumps(tokens))
    run = config(llama, data={"seq_len": 32}, student={"from_teacher": None, "from_config": {"vocab_size": 60}})
    (llama / "teacher" / "config.json").write_text((llama / "kept.json").read_text())
    assert model_warnings(run) == ["the tokenizer has 64 ids and the student embeds 60: text with any other is refused"]


@pytest.mark.parametrize(("steps", "each"), [(1, 64), (3, 192)])
def test_tokens_per_step_that_no_number_of_ranks_makes_up_are_refused(tmp_path: Path, steps: int, each: int) -> None:
    train = {"micro_batch_size": 2, "tokens_per_step": 2 * each, "gradient_accumulation_steps": steps}
    data = {"seq_len": 32}
    assert early_problems(config(tmp_path, data=data, train=train)) == []
    (line,) = early_problems(config(tmp_path, data=data, train={**train, "tokens_per_step": 100}))
    assert line.startswith("train.tokens_per_step is 100, wanted a multiple of micro_batch_size 2 x seq_len 32")
    assert f"= {each} tokens" in line


@pytest.mark.parametrize("package", ["transformers", "tensorboard", "datasets", "deepspeed"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    sections = {"data": {"train": "owner/name"}} if package == "datasets" else {}
    sections |= {"train": {"parallel": "deepspeed"}} if package == "deepspeed" else {}
    (line,) = early_problems(config(tmp_path, **sections))
    assert package in line and "is not installed" in line and "pip install" in line
