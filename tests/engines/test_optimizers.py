"""AdamW in 8 bits: near the one in 32, with states that are what they are said to be."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from kd_plugin.distributed.torch_internals import inner_tensors
from kd_plugin.engines.optimizers import make_adamw, set_learning_rate, states_differ
from kd_plugin.settings.run import TrainConfig
from tests.allocations import allocator_record

CPU = torch.device("cpu")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a compiler, which takes its time."""
    monkeypatch.setattr("kd_plugin.engines.optimizers.missing_compiler", lambda device: "a test")


def trained(name: str, steps: int = 30) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a regression, and the optimizer; one matrix is large enough for 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 7))
    x, y = torch.randn(50, 64), torch.randn(50, 7)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = make_adamw(groups, TrainConfig(learning_rate=1e-2, optimizer=name), CPU, fused=False)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, 1e-2 * (step + 1) / steps)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_8_bits_train_like_32(eager: None) -> None:
    pytest.importorskip("torchao")
    wide, _ = trained("adamw")
    narrow, optimizer = trained("adamw_8bit")
    assert narrow[0] == wide[0] and narrow[-1] < 0.5 * narrow[0]
    assert narrow == pytest.approx(wide, rel=0.05)
    moments = {
        tuple(p.shape): optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]
    }
    dtypes = {shape: inner_tensors(moment)[0].dtype for shape, moment in moments.items()}
    assert dtypes == {(96, 64): torch.uint8, (96,): torch.float32, (7, 96): torch.float32, (7,): torch.float32}


def test_the_learning_rate_is_the_one_that_is_set(eager: None) -> None:
    pytest.importorskip("torchao")
    for name in ("adamw", "adamw_8bit"):
        _, optimizer = trained(name, steps=2)
        before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
        set_learning_rate(optimizer, 0.0)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True)), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_it_is_what_it_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    compiled, _ = trained("adamw_8bit", steps=10)
    monkeypatch.setattr("kd_plugin.engines.optimizers.missing_compiler", lambda device: "a test")
    assert trained("adamw_8bit", steps=10)[0] == pytest.approx(compiled, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:OptimState8bit does not implement _stable_hash_for_caching:UserWarning")
def test_compiled_it_holds_both_moments_of_one_parameter_in_full() -> None:
    """As an estimate says."""
    pytest.importorskip("torchao")
    parameter = nn.Parameter(torch.randn(512, 768))
    optimizer = make_adamw([{"params": [parameter]}], TrainConfig(optimizer="adamw_8bit"), CPU, fused=False)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    _, peak = allocator_record(optimizer.step)
    assert peak == pytest.approx(8 * parameter.numel(), rel=0.05)


def test_without_a_compiler_it_says_that_it_runs_eager(eager: None, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao")
    with caplog.at_level(logging.WARNING):
        trained("adamw_8bit", steps=1)
    assert "train.optimizer adamw_8bit runs eager, and slowly: a test" in caplog.text


def test_without_torchao_it_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_plugin.settings.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchao is not installed .* pip install 'kd-plugin\[quantize\]'"):
        trained("adamw_8bit", steps=1)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (("adamw", 1), ("auto", 4), ""),
        (("adamw_8bit", 2), ("adamw_8bit", 2), ""),
        (("adamw_8bit", 2), ("adamw_8bit", 4), "was written by 2 ranks, now there are 4"),
        (("adamw", 2), ("adamw_8bit", 2), "was written with train.optimizer adamw, this run has adamw_8bit"),
        (("adamw_8bit", 1), ("auto", 1), "was written with train.optimizer adamw_8bit, this run has auto"),
    ],
)
def test_states_in_8_bits_are_read_as_they_were_written(
    before: tuple[str, int], now: tuple[str, int], words: str
) -> None:
    found = states_differ(before, now)
    assert found.startswith(words) and bool(found) == bool(words)
