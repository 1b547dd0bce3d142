"""A student that breaks stops its run within a few steps, and leaves its last finite checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler

import kd_plugin as kd
from kd_plugin.cli.launcher import launch
from kd_plugin.distributed.layout import values_here
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.engines.protocol import EngineError
from kd_plugin.engines.zero import DeepSpeedEngine
from kd_plugin.plugin.metrics import MetricSums
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import to_yaml
from kd_plugin.training import checkpoint, loop
from kd_plugin.training.finite import BrokenWeightsError, DivergedError, FiniteWatch, has_finite_parameters
from tests.tiny_runs import make_folder, run_config

FINE, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)


def first_broken(steps: list[tuple[Tensor, Tensor | None]], *, scaled: bool) -> int:
    watch = FiniteWatch(scaled=scaled)
    assert watch.first_broken_step() == 0
    for step, (loss, norm) in enumerate(steps, start=1):
        watch.add(step, loss, norm)
    return watch.first_broken_step()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("broken", "expected"),
    [((NAN, FINE), 3), ((NAN, None), 3), ((FINE, NAN), 3), ((FINE, INF), 3), ((INF, FINE), 0), ((INF, None), 0)],
)
def test_the_first_broken_step_is_known(broken: tuple[Tensor, Tensor | None], expected: int) -> None:
    fine = (FINE, None if broken[1] is None else FINE)
    assert first_broken([fine, fine, broken, fine, broken], scaled=False) == expected


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(FINE, INF)] * 16 + [(FINE, FINE)], 0),  # the scale is found
        (([(FINE, INF)] + [(FINE, FINE)] * 3) * 20, 0),  # and sometimes grows too far
        ([(FINE, FINE)] + [(NAN, NAN)] * 7 + [(FINE, FINE)], 0),
        ([(FINE, FINE)] + [(NAN, NAN)] * 8, 2),
        ([(FINE, FINE)] * 2 + [(FINE, NAN)] * 39, 0),
        ([(FINE, FINE)] * 2 + [(FINE, NAN)] * 40, 3),
    ],
)
def test_steps_that_a_loss_scale_leaves_out_are_no_fault(
    steps: list[tuple[Tensor, Tensor | None]], expected: int
) -> None:
    assert first_broken(steps, scaled=True) == expected


def test_a_step_is_remembered_without_reading_it() -> None:
    """Tensors without data: a number that is asked for is an error."""
    watch = FiniteWatch(scaled=False)
    for step in (1, 2):
        watch.add(step, FINE.to("meta"), FINE.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.first_broken_step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def config_of(folder: Path, name: str, *, dtype: str = "float32", every: int = 100, **train: object) -> RunConfig:
    log = {"output_dir": str(folder / name), "tensorboard": False, "every": every}
    train = {"max_steps": 20, "save_every": 2, "keep_checkpoints": 1, "export": False, **train}
    return run_config(folder, name, student={"dtype": dtype}, log=log, train=train)


@pytest.fixture
def break_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Fill the student's embedding with NaN after the step given; returns the list of steps that were taken.

    With `unread`, only the row of a token that does not occur, which no loss shows.
    """

    def plant(last: int, *, unread: bool = False) -> list[int]:
        taken: list[int] = []
        original = FsdpEngine.step

        def step(engine: FsdpEngine, learning_rate: float) -> Tensor | None:
            norm = original(engine, learning_rate)
            taken.append(len(taken) + 1)
            if len(taken) == last:
                weight = values_here(next(engine.module.parameters()))
                weight[: 1 if unread else None].fill_(math.nan)
            return norm

        monkeypatch.setattr(FsdpEngine, "step", step)
        return taken

    return plant


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


@pytest.mark.parametrize(("last", "stopped", "unread"), [(4, 4, False), (4, 4, True), (5, 6, False), (5, 6, True)])
def test_a_broken_student_is_never_saved_and_the_finite_checkpoint_stays(
    folder: Path, last: int, stopped: int, unread: bool, break_after: Callable[..., list[int]]
) -> None:
    name, taken = f"broken_{last}_{unread}", break_after(last, unread=unread)
    left = f"step_{stopped - 2:08d}"
    with pytest.raises(DivergedError, match=f"diverged at step .*lower train.learning_rate.*{left}, from which"):
        kd.train(config_of(folder, name))
    assert taken[-1] == stopped and names(folder / name) == [left]
    assert json.loads((folder / name / "checkpoints" / left / "run.json").read_text())["finite"] is True
    assert not list((folder / name / "checkpoints").glob("*.partial"))
    taken.clear()  # the NaN is planted after as many steps again
    result = kd.train(config_of(folder, name, max_steps=stopped, resume=True))
    assert result.step == stopped and names(folder / name) == [f"step_{stopped:08d}"]


def test_a_run_that_nobody_logs_stops_within_eight_steps(folder: Path, break_after: Callable[..., list[int]]) -> None:
    taken = break_after(9)
    with pytest.raises(DivergedError, match=r"diverged at step 10 \(step 16: loss nan.*save_every is 0"):
        kd.train(config_of(folder, "unlogged", save_every=0))
    assert taken[-1] == 16


def test_finite_weights_without_a_loss_are_no_checkpoint(folder: Path) -> None:
    """So large that every logit overflows."""
    with pytest.raises(DivergedError, match=r"diverged at step 1: its update left weights.*there is no checkpoint"):
        kd.train(config_of(folder, "large", learning_rate=1e38, warmup_steps=0, save_every=1))
    assert names(folder / "large") == []


def test_the_command_ends_with_one_line_and_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, "command", learning_rate=1e38, warmup_steps=0, save_every=0, parallel="single")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    code = launch([str(tmp_path / "c.yaml")], script="train.py", default="fsdp", allowed=("single", "fsdp"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2 and "diverged at step" in line and "lower train.learning_rate" in line


def test_a_loss_scale_that_is_still_sought_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FsdpEngine, "_make_scaler", lambda engine, device_type, enabled: GradScaler(device_type, init_scale=2.0**28)
    )
    config = config_of(folder, "scaled", dtype="float16", every=1, max_steps=18, save_every=18)
    history = kd.train(config).history
    assert sum(not math.isfinite(values["grad_norm"]) for values in history) > 2
    assert math.isfinite(history[-1]["grad_norm"]) and names(folder / "scaled") == ["step_00000018"]


@pytest.fixture
def broken_run(folder: Path, request: pytest.FixtureRequest) -> Path:
    """Checkpoints of steps 2 (finite) and 4 (not), as a version without safeguards has left them."""
    with pytest.MonkeyPatch.context() as patch:
        original = FsdpEngine.step
        taken: list[int] = []

        def step(engine: FsdpEngine, learning_rate: float) -> Tensor | None:
            taken.append(1)
            norm = original(engine, learning_rate)
            if len(taken) == 4:
                next(engine.module.parameters()).data.fill_(math.nan)
            return norm

        patch.setattr(FsdpEngine, "step", step)
        patch.setattr(loop, "_is_sound", lambda session: True)
        with pytest.raises(ValueError, match="diverged"):
            kd.train(config_of(folder, request.node.name, max_steps=4, keep_checkpoints=2))
    for path in checkpoint.checkpoints(folder / request.node.name):
        run = json.loads((path / "run.json").read_text())
        del run["finite"]
        (path / "run.json").write_text(json.dumps(run))
    return folder / request.node.name


def test_an_old_checkpoint_that_is_not_finite_is_refused(folder: Path, broken_run: Path) -> None:
    config = config_of(folder, broken_run.name, max_steps=6, resume=True)
    assert names(broken_run) == ["step_00000002", "step_00000004"]
    wanted = r"step_00000004 holds weights that are NaN or infinite; the newest finite one is .*step_00000002: remove"
    with pytest.raises(checkpoint.CheckpointError, match=wanted):
        kd.train(config)
    (broken_run / "checkpoints" / "step_00000004").rename(broken_run / "elsewhere")
    assert kd.train(config).step == 6


def test_pruning_never_takes_what_was_just_saved(folder: Path) -> None:
    """A checkpoint of a later step may be older, and broken."""
    config = config_of(folder, "pruned", max_steps=2)
    output = kd.train(config).output_dir
    (output / "checkpoints" / "step_00000002").rename(output / "checkpoints" / "step_00000009")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "to_continue", lambda config, world_size: None)
        kd.train(config)
    assert names(output) == ["step_00000002", "step_00000009"]


def test_what_the_last_bits_depend_on_is_kept_and_compared(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = kd.train(config_of(folder, "bits", max_steps=2)).output_dir
    note = output / "checkpoints" / "step_00000002" / "run.json"
    run = json.loads(note.read_text())
    assert {"torch", "row_kernel", "device", "bfloat16 products", "float16 products"} <= run["numerics"].keys()
    run["numerics"]["bfloat16 products"] = "in bfloat16 (the processor has amx_tile)"
    note.write_text(json.dumps(run))
    caplog.clear()
    kd.train(config_of(folder, "bits", max_steps=4, resume=True))
    (line,) = [line for line in caplog.messages if "last bits may differ" in line]
    assert "bfloat16 products was in bfloat16 (the processor has amx_tile), now it is in " in line


@pytest.mark.parametrize("message", ["Current loss scale already at minimum - cannot decrease scale anymore", "else"])
def test_deepspeeds_last_loss_scale_ends_with_a_cure(message: str) -> None:
    def step() -> None:
        raise Exception(message)

    engine = object.__new__(DeepSpeedEngine)
    engine.student = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), step=step)
    with pytest.raises(Exception, match="use bfloat16" if "scale" in message else "^else$") as caught:
        engine.step(0.1)
    assert isinstance(caught.value, EngineError) == ("scale" in message)


def test_numbers_are_taken_whatever_the_default_device() -> None:
    sums = MetricSums(("a",))
    sums.add(torch.tensor([2.0]))
    with torch.device("meta"):
        assert sums.take(torch.device("cpu"), largest={"b": 3.0}) == {"a": 2.0, "b": 3.0}


@pytest.mark.usefixtures("one_rank")
def test_an_infinite_moment_of_the_optimizer_is_not_finite() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert has_finite_parameters(model, optimizer)
    optimizer.state[model.weight]["exp_avg_sq"][1, 1] = float("inf")
    assert has_finite_parameters(model) and not has_finite_parameters(model, optimizer)


def test_a_checkpoint_that_only_another_rank_sees_is_no_fresh_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, "elsewhere", resume=True)
    monkeypatch.setattr(checkpoint, "all_gather_object", lambda names, *_: [[], ["step_00000004"]])
    with pytest.raises(ValueError, match=r"rank 0 sees no checkpoint .*rank 1 sees step_00000004.*all machines share"):
        checkpoint.to_continue(config, world_size=2)


@pytest.mark.parametrize(("side", "model"), [("teacher", "teacher"), ("student", "student")])
def test_weights_that_are_no_numbers_are_named_before_anything_is_trained(
    folder: Path, tmp_path: Path, side: str, model: str
) -> None:
    """A download that was damaged, or a run that diverged elsewhere; no learning rate cures it."""
    shutil.copytree(folder / "teacher", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = math.inf if side == "student" else math.nan
    save_file(weights, file, metadata={"format": "pt"})
    config = config_of(folder, f"broken_{side}")
    changes = {"model": str(tmp_path / "broken")}
    changes |= {"from_teacher": None, "from_config": None} if side == "student" else {}
    config = config.model_copy(update={side: getattr(config, side).model_copy(update=changes)})
    said = rf"1 weight\(s\) of the {side} \({tmp_path}/broken\) hold NaN or infinity, such as model.norm.weight"
    with pytest.raises(BrokenWeightsError, match=said):
        kd.train(config)
