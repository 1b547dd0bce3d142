"""Under DDP, FSDP2, ZeRO-2 and ZeRO-3 a trainer's losses and parameters are those of one process's dense loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

import kd_plugin as kd
from tests.hf_runs import CONFIG, Reference, adam, approximately, assert_same_parameters, dense, make_pair
from tests.ranks import hf_worker
from tests.ranks.hf_worker import HELD_OUT, RAGGED, ROWS, WRAPPERS
from tests.ranks.launch import Launch, Launched

CASES = {f"{kind} {wrapper}": (kind, wrapper) for kind in ("trainer", "sft") for wrapper in WRAPPERS}
AHEAD = {"teacher_micro_batches": 4}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "replicated": ("trainer", "ddp", {"teacher_sharding": "replicate"}),
    "ahead fsdp": ("trainer", "fsdp", AHEAD),
    "by name zero3": ("trainer", "zero3", {"teacher": "by name"}),
    "ahead zero3": ("trainer", "zero3", AHEAD),
    **{f"soft on all {wrapper}": ("trainer", wrapper, {"soft_on": "all"}) for wrapper in ("ddp", "fsdp", "zero3")},
}
ALL = {**{name: (*case, {}) for name, case in CASES.items()}, **OTHERS}


def spec(*wrappers: str) -> list[dict[str, Any]]:
    """The cases under these wrappers."""
    listed = [{"name": n, "kind": k, "wrapper": w, "changed": c} for n, (k, w, c) in ALL.items() if w in wrappers]
    return sorted(listed, key=lambda entry: WRAPPERS.index(entry["wrapper"]))


# DeepSpeed stays switched on in a process that has used it.
LAUNCHES = {
    "torch": Launch(hf_worker, ranks=2, spec=spec("ddp", "fsdp"), timeout_s=600),
    "deepspeed": Launch(hf_worker, ranks=2, spec=spec("zero2", "zero3"), needs_deepspeed=True, timeout_s=600),
}
pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def found(launched: Callable[[str], Launched], name: str) -> list[dict[str, Any]]:
    """What both ranks say."""
    return launched("deepspeed" if "zero" in ALL[name][1] else "torch").file(f"{name}.pt")


@pytest.fixture(scope="module")
def references() -> Callable[[str, int], Reference]:
    made: dict[tuple[str, str, int], Reference] = {}

    def of(name: str, steps: int) -> Reference:
        kind, _, _ = ALL[name]
        rows, config = ROWS if kind == "sft" else RAGGED, config_of(name)
        key = (kind, config.soft_on, steps)
        if key not in made:
            made[key] = Reference(rows, config, steps=steps, optimizer=adam)
        return made[key]

    return of


def config_of(name: str) -> kd.DistillConfig:
    return CONFIG.model_copy(update={"soft_on": ALL[name][2].get("soft_on", "trained")})


def values(history: Sequence[dict[str, float]], name: str = "loss") -> list[float]:
    return [entry[name] for entry in history if name in entry]


@BOTH
def test_losses_are_the_dense_ones_on_every_rank(found: Any, name: str, references: Any) -> None:
    wanted = references(name, 3)
    for report in found:
        assert values(report["history"]) == approximately(wanted.losses)
        assert values(report["history"], "soft_loss") == approximately(wanted.soft)
        assert values(report["history"], "hard_loss") == approximately(wanted.hard)


@BOTH
def test_an_evaluation_counts_every_held_out_token_once(found: Any, name: str, references: Any) -> None:
    """Seven rows on two ranks, two at a time: the last batch is filled up with rows of the first."""
    after = references(name, 1)
    wanted = dense((after.student, after.teacher), HELD_OUT, config_of(name))
    for report in found:
        assert values(report["history"], "eval_valid_tokens")[0] == wanted.num_valid
        assert values(report["history"], "eval_loss")[0] == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
        assert values(report["history"], "eval_soft_loss")[0] == pytest.approx(wanted.soft, rel=1e-5)


@BOTH
def test_the_best_checkpoint_is_loaded_at_the_end(found: Any, name: str, references: Any) -> None:
    """By the greatest evaluation loss, which is not that of the last step."""
    losses = values(found[0]["history"], "eval_loss")
    step = 1 + losses.index(max(losses))
    assert step < 3 and found[0]["best_checkpoint"] == f"checkpoint-{step}"
    assert_same_parameters(found[0]["best"], references(name, step).student)


@BOTH
def test_a_resumed_run_ends_where_the_whole_one_does(found: Any, name: str, references: Any) -> None:
    wanted = references(name, 3)
    assert values(found[0]["resumed"]) == approximately(wanted.losses)
    assert_same_parameters(found[0]["last"], wanted.student)
    assert found[0]["last"].keys() == dict(make_pair()[0].state_dict()).keys(), "nothing of the teacher"


WRAPPED = {
    "ddp": "DistributedDataParallel MULTI_CPU",
    "fsdp": "FSDPLlamaForCausalLM FSDP",
    "zero2": "DeepSpeedEngine DEEPSPEED",
    "zero3": "DeepSpeedEngine DEEPSPEED",
}


@BOTH
def test_student_and_teacher_are_wrapped_as_said(found: Any, name: str) -> None:
    _, wrapper, changed = ALL[name]
    for report in found:
        assert report["wrapped"] == WRAPPED[wrapper]
        whole = changed.get("teacher_sharding") == "replicate"
        assert report["teacher_share"] == 1 if whole else 0.4 < report["teacher_share"] < 0.6
