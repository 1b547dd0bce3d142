"""The time of a step: sums by hand at round speeds, what hides behind what, and what is chosen by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kd_plugin.estimate.account import Estimate, estimate
from kd_plugin.estimate.speeds import Speeds
from kd_plugin.estimate.step_time import Phase, StepTime
from kd_plugin.estimate.tables import notes_of, tables_of
from kd_plugin.settings.device_peaks import PEAKS
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config

VOCAB, WIDTH, ROWS = 64, 32, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def timed(folder: Path, *, speeds: Speeds = SPEEDS, world_size: int = 1, **sections: object) -> StepTime:
    rows = ROWS if world_size == 1 else None
    time = estimate(run_config(folder, **sections), rows=rows, world_size=world_size, device="cpu", speeds=speeds).time
    assert time is not None
    return time


def phases(time: StepTime) -> dict[str, Phase]:
    return {phase.name: phase for phase in time.phases}


def test_the_loss_is_its_four_products_and_one_row_pass(folder: Path) -> None:
    """50 rows in chunks of 48, four micro-batches: the second chunk reads and writes the head's gradient."""
    loss = phases(timed(folder))["loss"]
    product = 2 * ROWS * VOCAB * WIDTH
    assert loss.products == pytest.approx(4 * product * (1 / 3e9 + 1 / 4e9 + 1 / 5e9 + 1 / 6e9))
    gradient = 4 * VOCAB * WIDTH
    assert loss.memory == pytest.approx(4 * (ROWS * VOCAB * 8e-9 + 2 * gradient / 7e9 + 3 * gradient / 3e9))


def test_a_frozen_head_has_no_product_for_its_gradient(folder: Path) -> None:
    loss = phases(timed(folder, student={"freeze": ["lm_head"]}))["loss"]
    assert loss.products == pytest.approx(4 * 2 * ROWS * VOCAB * WIDTH * (1 / 3e9 + 1 / 4e9 + 1 / 5e9))


def test_without_a_teacher_there_is_none_of_its_work(folder: Path) -> None:
    time = timed(folder, distill={"soft_weight": 0.0, "hard_weight": 1.0})
    assert "teacher forward" not in phases(time)
    assert phases(time)["loss"].products == pytest.approx(4 * 2 * ROWS * VOCAB * WIDTH * (1 / 3e9 + 1 / 5e9 + 1 / 6e9))


def test_half_precision_heads_are_copied_on_a_cpu(folder: Path) -> None:
    half = {side: {"dtype": "bfloat16"} for side in ("student", "teacher")}
    wide, narrow = (phases(timed(folder, **more))["loss"].memory for more in ({}, half))
    copied = 2 * VOCAB * WIDTH * (2 + 4) + ROWS * VOCAB * (4 + 2)
    scaled = VOCAB * WIDTH * (2 - 4)  # the gradient that backward hands over
    assert narrow - wide == pytest.approx(4 * (copied / 7e9 + scaled / 3e9))


def test_the_passes_are_a_roofline_of_the_counted_operations(folder: Path) -> None:
    time = timed(folder)
    setup = estimate(run_config(folder), device="cpu", speeds=SPEEDS).setup
    assert setup.student.work is not None
    products = memory = 0.0
    for op, count in setup.student.work.forward.items():
        computing, moving = op.flops / {"attention": 5e8}.get(op.kind, 1e9), op.num_bytes / 1e10
        if computing >= moving:
            products += 4 * count * computing
        else:
            memory += 4 * count * moving
    forward = phases(time)["student forward"]
    assert (forward.products, forward.memory) == pytest.approx((products, memory))
    assert forward.host == pytest.approx(4e-6 * sum(setup.student.work.forward.values()))
    assert products > 0 < memory


def test_checkpointing_runs_the_student_forward_once_more(folder: Path) -> None:
    plain, again = (phases(timed(folder, train={"activation_checkpointing": on})) for on in (False, True))
    more = again["student backward, forward again"].seconds - plain["student backward"].seconds
    assert more == pytest.approx(plain["student forward"].seconds)


def test_a_step_is_all_micro_batches_of_all_ranks(folder: Path) -> None:
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", "micro_batch_size": None}  # not ahead
    once, four = (
        timed(folder, teacher=teacher, train={"tokens_per_step": None, "gradient_accumulation_steps": times})
        for times in (1, 4)
    )
    assert four.tokens == 4 * once.tokens == 4 * 2 * 32
    ratio = {name: phase.seconds / phases(once)[name].seconds for name, phase in phases(four).items()}
    assert ratio["teacher forward"] == ratio["student backward"] == ratio["loss"] == pytest.approx(4)
    assert ratio["optimizer"] == pytest.approx(1)
    assert once.tokens_per_second == pytest.approx(once.tokens / sum(phase.seconds for phase in once.phases))
    assert sum(once.limits.values()) == pytest.approx(1)
    assert list(once.limits.values()) == sorted(once.limits.values(), reverse=True)


def test_the_wire_is_its_bytes_and_hides_only_where_the_device_works_alone(folder: Path) -> None:
    train = {"parallel": "fsdp", "tokens_per_step": None}
    config = run_config(folder, train=train, distill={"exchange": "weight"})
    estimated = estimate(config, world_size=4, device="cpu", speeds=SPEEDS)
    assert estimated.time is not None
    heads, rest = estimated.exchanges["weight"].num_bytes, sum(line.num_bytes for line in estimated.parameters)
    found = phases(estimated.time)
    assert found["heads' exchange: weight"].wire == pytest.approx(heads / 9e8)
    assert found["parameters and gradients"].wire == pytest.approx(rest / 9e8)

    def exposed(wire: float) -> float:
        speeds = replace(SPEEDS, is_asynchronous=True, wire=wire, operation_seconds=0.0)
        time = estimate(config, world_size=4, device="cpu", speeds=speeds).time
        assert time is not None
        named = phases(time)
        computing = sum(phase.seconds for name, phase in named.items() if name.startswith(("teacher", "student")))
        assert named["heads' exchange: weight"].wire == pytest.approx(heads / wire)
        waited = named["parameters and gradients"].wire if "parameters and gradients" in named else 0.0
        assert waited == pytest.approx(max(0.0, rest / wire - computing))
        return waited

    assert exposed(1e12) == 0.0 < exposed(1e6)


def test_the_host_counts_on_a_gpu_where_it_is_slower(folder: Path) -> None:
    slow, fast = (
        timed(folder, speeds=replace(SPEEDS, is_asynchronous=True, operation_seconds=seconds)) for seconds in (1, 1e-12)
    )
    setup = estimate(run_config(folder), device="cpu", speeds=SPEEDS).setup
    assert setup.student.work is not None
    assert phases(slow)["student forward"].seconds == pytest.approx(4 * sum(setup.student.work.forward.values()))
    assert phases(fast)["student forward"].host == 0.0


def gpu_estimate(folder: Path, gpu: str, **sections: object) -> Estimate:
    train = {"parallel": "fsdp", "tokens_per_step": None}
    return estimate(run_config(folder, train=train, **sections), world_size=8, gpu=gpu, gpu_memory_gib=80)


def test_gpus_are_timed_and_choose_by_their_table(folder: Path) -> None:
    estimated = gpu_estimate(folder, "H200")
    assert estimated.time is not None
    speeds = estimated.time.speeds
    assert speeds.how == "H200 from the table of peaks, not measured"
    assert speeds.memory == PEAKS["H200"].memory and speeds.wire == 0.75 * PEAKS["H200"].wire
    seconds = [choice.step_seconds for choice in estimated.choices]
    known = [value for value in seconds if value is not None]
    assert len(known) == len(seconds) > 2
    rounded = [float(f"{value:.3g}") for value in known]
    assert rounded == sorted(rounded)
    same = [choice for choice in estimated.choices if choice.mode == "fsdp" and choice.teacher_sharded]
    assert same[0].step_seconds == pytest.approx(estimated.time.seconds)
    assert "the fastest of what fits" in "\n".join(notes_of(estimated))
    assert "so the least time" in "\n".join(notes_of(estimated))


def test_half_the_wire_takes_longer_where_it_is_waited_for(folder: Path) -> None:
    fast, slow = (gpu_estimate(folder, gpu).time for gpu in ("A100", "A100 80GB PCIe"))
    assert fast is not None and slow is not None
    heads = [next(phase.wire for phase in time.phases if phase.name.startswith("heads")) for time in (fast, slow)]
    assert heads[1] / heads[0] == pytest.approx(300 / 64)


def test_cpus_choose_by_bytes(folder: Path) -> None:
    config = run_config(folder, train={"parallel": "fsdp", "tokens_per_step": None})
    estimated = estimate(config, world_size=8, device="cpu", speeds=SPEEDS, gpu_memory_gib=80)
    assert all(choice.step_seconds is None for choice in estimated.choices)
    moved = [choice.step_bytes for choice in estimated.choices]
    assert moved == sorted(moved)
    assert "the least traffic of what fits" in "\n".join(notes_of(estimated))


def test_a_model_that_does_not_run_without_values_has_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    def forward(*_: object, **__: object) -> None:
        raise RuntimeError("looks at values")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    estimated = estimate(run_config(folder, data={"seq_len": 24}, train={"tokens_per_step": None}), gpu="H100")
    assert estimated.time is None
    assert "unknown: the step time, LlamaForCausalLM does not run on the meta device: looks at values" in notes_of(
        estimated
    )
    assert not any("time of one optimizer step" in table.title for table in tables_of(estimated))
