"""Bytes of quantised teachers and 8-bit states, as estimated and as held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_plugin.distributed.layout import values_here
from kd_plugin.distributed.torch_internals import inner_tensors
from kd_plugin.estimate.account import Estimate, EstimateError, estimate
from kd_plugin.estimate.quantization import adamw_bytes, packed_as
from kd_plugin.estimate.tables import notes_of
from kd_plugin.models.loading import load_teacher
from kd_plugin.settings.run import RunConfig
from tests.round_speeds import SPEEDS
from tests.tiny_models import make_model
from tests.tiny_runs import engine_after_a_step, make_folder, run_config

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_folder(tmp_path_factory.mktemp("tiny"))
    make_model("llama", width=256, vocab_size=64, seed=7, dtype=torch.float32).save_pretrained(path / "wide")
    make_model("llama_tied", width=256, vocab_size=64, seed=7, dtype=torch.float32).save_pretrained(path / "tied")
    return path


def config(folder: Path, name: str = "wide", *, train: dict[str, Any] | None = None, **teacher: Any) -> RunConfig:
    teacher = {"model": str(folder / name), "sharding": "replicate", **teacher}
    student = {"from_teacher": None, "from_config": WIDE}
    return run_config(folder, teacher=teacher, student=student, train={"tokens_per_step": None, **(train or {})})


def lasting(estimated: Estimate) -> dict[str, float]:
    return {line.name: line.num_bytes for line in estimated.memory.lasting}


def held(tensors: Any) -> int:
    return sum(part.nbytes for tensor in tensors for part in inner_tensors(values_here(tensor)))


@pytest.mark.parametrize("name", ["wide", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_teacher_is_as_large_as_estimated(folder: Path, name: str, dtype: str, quantization: str) -> None:
    pytest.importorskip("torchao")
    run = config(folder, name, dtype=dtype, quantization=quantization)
    estimated = estimate(run, device="cpu", speeds=SPEEDS)
    real = held(load_teacher(run.teacher).parameters())
    assert lasting(estimated)["teacher"] == pytest.approx(real, rel=0.05)
    whole = estimate(config(folder, name, dtype=dtype), device="cpu", speeds=SPEEDS)
    assert lasting(estimated)["teacher"] < 0.75 * lasting(whole)["teacher"]


def test_one_of_its_weights_is_unpacked_at_a_time(folder: Path) -> None:
    phase = estimate(config(folder, quantization="int8")).memory.phases["teacher forward"]
    (line,) = (line for line in phase if line.name == "teacher weight, unpacked")
    assert line.num_bytes == 4 * 256 * 512


def test_what_a_mapping_leaves_out_is_counted_whole(folder: Path) -> None:
    block = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "mlp.down_proj"]}
    every, some = (lasting(estimate(config(folder, quantization=q)))["teacher"] for q in ("bitsandbytes_8bit", block))
    assert some - every == 2 * 256 * (3 * 512 - 4)  # two layers, whose rows of 512 have no scale then


def test_a_gpus_kernels_of_four_bits_want_padding(folder: Path) -> None:
    """128 columns share a scale and a zero; the kernel reads 1024 columns at a time."""
    packed = packed_as("int4")
    assert packed.num_bytes(4096, 4096, 2, "cuda") == 4096 * 4096 * (0.5 + 4 / 128)
    assert packed.num_bytes(4093, 4000, 2, "cuda") == 4096 * 4096 * (0.5 + 4 / 128)
    assert packed.num_bytes(4093, 4096, 2, "cpu") == 4093 * 4096 * (0.5 + 4 / 128)


def test_a_checkpoint_is_counted_as_it_says_that_it_is_quantised(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "wide" / "config.json").read_text())
    whole = lasting(estimate(config(folder)))["teacher"]
    for method, found in (("gptq", 0.5), ("mxfp4", None), ("quanto", 4)):
        block = {"quant_method": method, "bits": 4} if method == "gptq" else {"quant_method": method}
        (tmp_path / method).mkdir()
        (tmp_path / method / "config.json").write_text(json.dumps({**values, "quantization_config": block}))
        run = config(folder).model_copy(deep=True)
        run = run.model_copy(update={"teacher": run.teacher.model_copy(update={"model": str(tmp_path / method)})})
        size = lasting(estimate(run))["teacher"]
        assert (size < 0.6 * whole) == (found == 0.5), method
        (line,) = (line for line in estimate(run).memory.lasting if line.name == "teacher")
        assert ("nothing here knows the bytes of quanto" in line.how) == (method == "quanto")


def test_no_way_to_spread_it_shards_it(folder: Path) -> None:
    estimated = estimate(config(folder, quantization="int8", train={"parallel": "fsdp"}), world_size=4)
    assert len(estimated.choices) > 1 and not any(choice.teacher_sharded for choice in estimated.choices)
    with pytest.raises(EstimateError, match=r"set teacher\.sharding to replicate"):
        estimate(config(folder, quantization="int8", sharding="shard", train={"parallel": "fsdp"}), world_size=4)


def test_the_time_says_what_it_leaves_out(folder: Path) -> None:
    run = config(folder, quantization="int8", train={"optimizer": "adamw_8bit"})
    text = "\n".join(notes_of(estimate(run)))
    assert "unpacking the teacher's quantised weights" in text and "the search for 8-bit codes" in text


def test_states_in_8_bits_are_as_large_as_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr("kd_plugin.engines.optimizers.missing_compiler", lambda device: "a test")
    run = config(folder, train={"optimizer": "adamw_8bit"})
    with engine_after_a_step(run) as engine:
        assert engine.torch_optimizer is not None
        states = [value for state in engine.torch_optimizer.state.values() for value in state.values()]
        real = held(states)
    estimated = lasting(estimate(run, device="cpu", speeds=SPEEDS))
    assert estimated["AdamW, 8 bits"] == pytest.approx(real, rel=0.05)
    assert estimated["AdamW, 8 bits"] < 0.5 * 2 * estimated["student gradients"]


def test_a_step_in_8_bits_needs_the_largest_parameter_in_full_and_more_time(folder: Path) -> None:
    estimated, wide = (
        estimate(config(folder, train={"optimizer": name}), device="cpu", speeds=SPEEDS)
        for name in ("adamw_8bit", "adamw_fused")
    )
    assert estimated.memory.phase_bytes("optimizer step") == 8 * 64 * 128
    seconds = [next(p.seconds for p in each.time.phases if p.name == "optimizer") for each in (estimated, wide)]
    assert seconds[0] == pytest.approx(seconds[1] * (18 * 28 + 12) / (28 + 12))


def test_parts_too_small_for_8_bits_are_counted_in_32() -> None:
    assert adamw_bytes(4096) == 2 * (4096 + 16 * 4 + 256 * 4)
    assert adamw_bytes(4095) == 8 * 4095 and adamw_bytes(4096 + 128) == 8 * (4096 + 128)


def test_many_ranks_leave_shards_too_small_for_8_bits(folder: Path) -> None:
    train = {"optimizer": "adamw_8bit", "parallel": "fsdp"}
    few, many = (lasting(estimate(config(folder, train=train), world_size=ranks)) for ranks in (1, 64))
    assert few["AdamW, 8 bits"] < few["student gradients"]
    assert many["AdamW, 8 bits"] == 2 * many["student gradients"]
