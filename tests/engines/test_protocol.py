"""What all backends share: the schedule, parameter groups, and how a launch becomes a layout."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kd_plugin.engines.process_group import share_timeout, start_process_group
from kd_plugin.engines.protocol import EngineError, parameter_groups
from kd_plugin.settings.run import TrainConfig
from kd_plugin.training.schedule import accumulation_steps, learning_rate_at, parallel_mode
from tests.tiny_runs import run_config


def test_warm_up_is_linear_and_cosine_ends_at_the_floor() -> None:
    train = TrainConfig(max_steps=20, warmup_steps=4, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, train) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5)  # half way from step 4 to step 20
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True) and len(set(rates[3:])) == 17


@pytest.mark.parametrize(("schedule", "half_way"), [("linear", 0.5), ("constant", 1.0)])
def test_other_schedules_half_way(schedule: str, half_way: float) -> None:
    train = TrainConfig(max_steps=11, learning_rate=1.0, schedule=schedule)
    assert learning_rate_at(1, train) == 1.0
    assert learning_rate_at(6, train) == pytest.approx(half_way)


def test_decay_reaches_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, plain = parameter_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0


def test_tokens_per_step_sets_the_accumulation() -> None:
    assert accumulation_steps(TrainConfig(tokens_per_step=1024, micro_batch_size=2), seq_len=64, world_size=2) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens_per_step": 100}, "no multiple of"),
        ({"tokens_per_step": 128, "gradient_accumulation_steps": 3}, "is 3"),
    ],
)
def test_tokens_per_step_that_does_not_fit_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        accumulation_steps(TrainConfig(**settings), seq_len=64, world_size=1)


def test_groups_made_later_wait_as_long_as_the_run_says() -> None:
    place = start_process_group(7)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        groups = [dist.new_group([0]), *mesh.get_all_groups()]
        share_timeout(7)
        found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    finally:
        place.close()
    assert found == {timedelta(seconds=7)}


def test_single_with_two_processes_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"parallel": "single"})
    with pytest.raises(EngineError, match="2 processes were started"):
        parallel_mode(config, 2)
