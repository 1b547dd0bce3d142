"""DeepSpeed configurations are filled, conflicts refused together; FSDP2 units are what the plugin needs."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kd_plugin.engines.fsdp_units import ShardingError, decoder_layers, make_mesh
from kd_plugin.engines.zero import _initialize, deepspeed_settings
from kd_plugin.engines.zero_block import KNOWN_KEYS, DeepSpeedConfigError, conflicts, student_config, teacher_config
from kd_plugin.settings.run import RunConfig


def with_block(block: dict[str, Any] | None, dtype: str = "bfloat16", **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"from_teacher": {"layers": 2}, "dtype": dtype},
            "teacher": {"model": "x"},
            "train": {"micro_batch_size": 2, **train},
            "deepspeed": block,
        }
    )


def fill(block: dict[str, Any] | None, dtype: str = "bfloat16", **train: Any) -> tuple[dict[str, Any], list[str]]:
    return student_config(with_block(block, dtype, **train), world_size=4, accumulation=3, hidden_size=100)


def test_an_absent_block_becomes_zero_3_with_the_training_settings() -> None:
    block, filled = fill(None)
    assert block["train_batch_size"] == 24
    assert block["gradient_accumulation_steps"] == 3 and block["gradient_clipping"] == 1.0
    assert block["bf16"] == {"enabled": True} and block["fp16"] == {"enabled": False}
    assert block["zero_optimization"] == {"stage": 3}
    assert "deepspeed.train_batch_size: 24 (micro_batch_size 2 x accumulation 3 x 4 ranks)" in filled


def test_no_clipping_is_written_as_zero() -> None:
    assert fill(None, max_grad_norm=None)[0]["gradient_clipping"] == 0.0


def test_auto_is_resolved_and_given_values_stay() -> None:
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False}
    block, filled = fill({"train_batch_size": "auto", "zero_optimization": zero, "steps_per_print": 7})
    assert block["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 10_000, "overlap_comm": False}
    assert block["train_batch_size"] == 24 and block["steps_per_print"] == 7
    assert not any("stage" in line for line in filled)


def test_values_that_agree_are_accepted_silently() -> None:
    _, filled = fill({"gradient_clipping": 1, "train_micro_batch_size_per_gpu": 2})
    assert not any("gradient_clipping" in line or "micro_batch_size_per_gpu" in line for line in filled)


def test_all_conflicts_are_refused_in_one_error() -> None:
    block = {
        "train_batch_size": 8,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 4, "sub_group_size": "auto"},
    }
    with pytest.raises(DeepSpeedConfigError) as caught:
        fill(block)
    message = str(caught.value)
    for part in (
        "train_batch_size is 8 but micro_batch_size 2 x accumulation 3 x 4 ranks makes it 24",
        "gradient_clipping is 0.5 but train.max_grad_norm makes it 1.0",
        "fp16.enabled is True but student.dtype bfloat16 makes it False",
        "scheduler is set but train.schedule does this",
        "stage is 4",
        "sub_group_size is 'auto'",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation is no key that DeepSpeed reads, did you mean 'zero_o"),
        ({"xyzzy": 1}, "deepspeed.xyzzy is no key that DeepSpeed reads: change"),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization is 3, wanted a mapping such as {stage: 3}"),
        ({"optimizer": "adamw"}, "deepspeed.optimizer is 'adamw', wanted a mapping such as {type: AdamW}"),
        ({"bf16": True}, "deepspeed.bf16 is True, wanted a mapping such as {enabled: true}"),
        ({"optimizer": {"type": "Adam", "params": 3}}, "deepspeed.optimizer.params is 3, wanted a mapping"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage is 'two', wanted 0, 1, 2 or 3"),
    ],
)
def test_what_deepspeed_would_ignore_or_choke_on_is_one_line(block: dict[str, Any], said: str) -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        fill(block)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_known_key_is_a_word_of_deepspeeds_own_source() -> None:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("needs deepspeed")
    root = Path(spec.submodule_search_locations[0])
    files = [root / "runtime" / "config.py", *root.rglob("constants.py"), *root.rglob("*config*.py")]
    files += [root / "runtime" / "tensor_parallel" / "init_utils.py"]
    text = "".join(file.read_text() for file in files)
    missing = [key for key in KNOWN_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
    assert not missing


def test_conflicts_are_found_without_knowing_the_ranks() -> None:
    config = with_block({"train_batch_size": 8, "gradient_clipping": 0.5, "fp17": {}})
    assert conflicts(config) == [
        "deepspeed.fp17 is no key that DeepSpeed reads, did you mean 'fp16'?",
        "deepspeed.gradient_clipping is 0.5 but train.max_grad_norm makes it 1.0",
    ]
    assert any("train_batch_size is 8" in line for line in conflicts(config, world_size=4, accumulation=3))
    assert conflicts(with_block({"gradient_accumulation_steps": 3}, tokens_per_step=4096)) == []
    assert len(conflicts(with_block({"gradient_accumulation_steps": 3}))) == 1


def test_the_users_optimizer_gets_the_training_settings() -> None:
    block, _ = fill({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, learning_rate=3e-4)
    assert block["optimizer"]["params"] == {"lr": 3e-4, "weight_decay": 0.0, "betas": [0.9, 0.95], "eps": 1e-8}
    with pytest.raises(DeepSpeedConfigError, match=r"optimizer\.params\.lr is 1\.0"):
        fill({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}})


def test_offloading_the_torch_optimizer_is_settled() -> None:
    block, _ = fill({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    assert block["zero_force_ds_cpu_optimizer"] is False


def test_the_teacher_gathers_like_the_student_and_has_no_optimizer() -> None:
    zero = {"stage": 1, "stage3_param_persistence_threshold": 5, "offload_optimizer": {"device": "cpu"}}
    student, _ = fill({"zero_optimization": zero})
    teacher = teacher_config(student, precision="float16")
    assert teacher["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 5}
    assert teacher["fp16"]["enabled"] and not teacher["bf16"]["enabled"] and "optimizer" not in teacher


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        (None, {"device": "cpu", "pin_memory": True}),
        ({"device": "none"}, {"device": "cpu", "pin_memory": True}),
        ({"device": "nvme", "nvme_path": "/x"}, {"device": "nvme", "nvme_path": "/x"}),
    ],
)
def test_an_offloaded_teacher_is_offloaded_as_the_student_says(students: Any, expected: dict[str, Any]) -> None:
    block = {"zero_optimization": {"stage": 3, "offload_param": students}}
    assert teacher_config(block, precision="float32", offload=True)["zero_optimization"]["offload_param"] == expected
    assert teacher_config(block, precision="float32")["zero_optimization"]["offload_param"] == students


def test_buffers_keep_their_precision_under_deepspeed() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("inv_freq", torch.tensor([0.1234567, 3.0]))

    def cast_all(*, model: nn.Module, config: dict[str, Any]) -> tuple[Any, ...]:
        return model.bfloat16(), None, None, None  # what DeepSpeed does with bf16 enabled

    engine = _initialize(SimpleNamespace(initialize=cast_all), model, config={})
    assert engine.weight.dtype == torch.bfloat16
    assert engine.inv_freq.equal(torch.tensor([0.1234567, 3.0]))


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    log, filters = logging.getLogger("DeepSpeed"), list(warnings.filters)
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    with pytest.raises(KeyError, match="inside"), deepspeed_settings():
        assert os.environ["LOCAL_RANK"] == "0" and log.level == logging.WARNING
        assert warnings.filters != filters
        raise KeyError("inside")
    assert "LOCAL_RANK" not in os.environ and log.level == logging.INFO and warnings.filters == filters


def test_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(ShardingError, match="Linear names no decoder layers"):
        decoder_layers(nn.Linear(2, 2))


def test_shard_groups_must_divide_the_ranks() -> None:
    with pytest.raises(ShardingError, match="shard_size is 3, wanted a divisor of 4 ranks: choose one of 1, 2, 4"):
        make_mesh("cpu", 4, shard_size=3)
    with pytest.raises(ShardingError, match="shard_size is 0"):
        make_mesh("cpu", 4, shard_size=0)


def test_of_blocks_inside_of_blocks_the_outer_ones_are_units() -> None:
    """Mamba says of its blocks and of the mixers in them that they must not be split; FSDP2 knows no unit in a unit."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=3, **sizes))
    assert {"MambaBlock", "MambaMixer"} <= set(model._no_split_modules)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["MambaBlock"] * 3
