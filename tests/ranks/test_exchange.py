"""Whatever crosses the wire, under every wrapper: training as in one dense process, and traffic as computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.engines.fsdp_units import ShardingError, make_mesh
from kd_plugin.exchange import cost
from kd_plugin.loss.chunk_plan import local_plan
from tests.ranks import exchange_probes as probes
from tests.ranks import exchange_worker
from tests.ranks.exchange_cases import RAGGED, Case, count_valid, make_batch, make_models, train_densely
from tests.ranks.launch import Launches

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

MODES = ("weight", "logits", "stats")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


def matrix(wrapper: str, **changes: Any) -> list[Case]:
    """Tied and untied, each mode, each divergence."""
    return [
        Case(wrapper, tied, mode, divergence, **changes)
        for tied in (True, False)
        for mode in MODES
        for divergence in DIVERGENCES
    ]


def some(wrapper: str, **changes: Any) -> list[Case]:
    """Of the matrix each tying with each mode, and over them each divergence."""
    every = matrix(wrapper, **changes)
    return [every[len(DIVERGENCES) * row + row % len(DIVERGENCES)] for row in range(len(every) // len(DIVERGENCES))]


def splits(wrapper: str, ranks: int) -> list[Case]:
    """The same 16 sequences in one micro-batch a rank, and one by one."""
    counts = (1, 16 // ranks)
    return [Case(wrapper, False, mode, ranks=ranks, batch="split", accumulation=n) for mode in MODES for n in counts]


def half(wrapper: str, *, tied: bool = False, ranks: int = 2) -> dict[str, list[Case]]:
    """bf16 on three batches: each mode, and the same wrapper without the plugin."""
    cases = {mode: Case(wrapper, tied, mode, dtype="bfloat16", ranks=ranks) for mode in MODES}
    cases["dense"] = replace(cases["weight"], loss="dense")
    return {name: [replace(case, seed=seed) for seed in range(3)] for name, case in cases.items()}


def flat(cases: dict[str, list[Case]]) -> list[Case]:
    return [case for several in cases.values() for case in several]


TORCH = ("ddp", "fsdp1", "alone", "grouped", "root")
# (wrapper, tied, ranks); the first few are quick
FEW_HALF = 3
HALF = [("alone", False, 2), ("fsdp1", True, 2), ("zero3", False, 2)]
HALF += [(wrapper, tied, 2) for wrapper in (*TORCH[1:], "zero1", "zero2", "zero3") for tied in (True, False)]
HALF += [("hsdp", tied, 4) for tied in (True, False)]
HALF = list(dict.fromkeys(HALF))
LAUNCHES: dict[str, list[Case]] = {
    "one": [*splits("alone", 1), *splits("zero3", 1)],
    "torch": [
        *(case for wrapper in TORCH for case in some(wrapper)),
        *(Case("alone", False, mode, teacher_vocab_size=size) for mode in MODES for size in (17, 31, 41)),
        *(Case("alone", False, "stats", divergence, teacher_vocab_size=17) for divergence in DIVERGENCES[1:]),
        *(Case(w, False, m, teacher_vocab_size=17) for w in ("ddp", "fsdp1", "root") for m in MODES[1:]),
        *(Case("alone", head == "softcap", "stats", head=head, teacher_vocab_size=31) for head in ("bias", "softcap")),
        *(Case("alone", tied, mode, teacher="offload") for tied, mode in ((False, "weight"), (True, "stats"))),
        *(Case("alone", tied, mode, teacher_tied=not tied) for tied in (True, False) for mode in MODES),
        *(Case(wrapper, False, mode, teacher="part") for wrapper in ("ddp", "fsdp1", "root") for mode in MODES),
        *(Case("alone", head == "softcap", mode, head=head) for head in ("bias", "softcap") for mode in MODES),
        *splits("alone", 2),
        *(Case(wrapper, False, mode, batch="early") for wrapper in ("ddp", "fsdp1", "alone") for mode in MODES),
        *(case for w, tied, n in HALF[:FEW_HALF] if w in TORCH for case in flat(half(w, tied=tied))),
    ],
    "deepspeed": [
        *(case for wrapper in ("zero1", "zero2", "zero3") for case in some(wrapper)),
        *(Case("zero3", False, mode, teacher_vocab_size=size) for mode in MODES for size in (17, 31)),
        *splits("zero3", 2),
        *(Case(f"zero{n}", False, "stats", batch="split", accumulation=times) for n in (1, 2) for times in (1, 8)),
        *(Case("zero3", False, mode, batch="early") for mode in MODES),
        *(Case(wrapper, False, mode, teacher="part") for wrapper in ("zero2", "zero3") for mode in MODES),
        *(Case("zero3", head == "softcap", mode, head=head) for head in ("bias", "softcap") for mode in MODES[1:]),
        *(case for w, tied, n in HALF[:FEW_HALF] if w not in TORCH for case in flat(half(w, tied=tied))),
    ],
    "four": [
        *some("hsdp", ranks=4),
        Case("hsdp", False, "stats", "tvd", ranks=4, teacher_vocab_size=31),
        *(Case(wrapper, False, "stats", ranks=4) for wrapper in ("alone", "fsdp1", "zero3")),
        Case("alone", False, "stats", ranks=4, vocab_size=9, teacher_vocab_size=7),
        *(Case("alone", False, mode, ranks=4, batch="ragged", chunk_size=256) for mode in MODES),
        *splits("alone", 4),
    ],
}
EVERY = {
    "torch, all": [
        *(case for wrapper in TORCH for case in matrix(wrapper)),
        *(case for w, tied, n in HALF if n == 2 and w in TORCH for case in flat(half(w, tied=tied))),
    ],
    "deepspeed, all": [
        *(case for wrapper in ("zero1", "zero2", "zero3") for case in matrix(wrapper)),
        *(case for w, tied, n in HALF if n == 2 and w not in TORCH for case in flat(half(w, tied=tied))),
    ],
    "four, all": [
        *matrix("hsdp", ranks=4),
        *(Case("alone", tied, mode, ranks=4) for tied in (True, False) for mode in MODES),
        *(Case("hsdp", False, "stats", "tvd", ranks=4, teacher_vocab_size=size) for size in (31, 41)),
        *(Case("hsdp", False, mode, ranks=4, batch="split", accumulation=4) for mode in MODES),
        *(Case(wrapper, False, "stats", ranks=4) for wrapper in ("fsdp1", "root")),
        *(
            Case(wrapper, False, mode, ranks=4)
            for wrapper in ("ddp", "grouped", "zero1", "zero2", "zero3")
            for mode in ("weight", "stats")
        ),
        *(Case(w, False, m, ranks=4, vocab_size=9, teacher_vocab_size=9) for w in ("alone", "zero3") for m in MODES),
        Case("alone", False, "stats", ranks=4, vocab_size=9, teacher_vocab_size=7),
        *(Case("alone", False, mode, ranks=4, batch="ragged", chunk_size=256) for mode in MODES),
        *splits("alone", 4),
        *(Case("zero3", False, m, ranks=4, batch="split", accumulation=n) for m in ("weight", "stats") for n in (1, 4)),
        *(case for tied in (True, False) for case in flat(half("hsdp", tied=tied, ranks=4))),
    ],
}
# The rest of the matrix, and one rank alone, are slow.
QUICK = [case for name, cases in LAUNCHES.items() if name != "one" for case in cases]
LAUNCHES |= {name: [case for case in cases if case not in QUICK] for name, cases in EVERY.items()}
PROBES = {
    "deepspeed": ["automatic_zero3", "outside_zero3"],
    "torch": [
        *("head_collectives", "memory", "counting", "rounds", "hooks", "mismatch", "agreement", "tensor_parallel"),
        *("larger_student", "following_teacher", "compiled"),
    ],
    "four": ["memory", "counting", "traffic", "groups", "automatic", "mismatch", "agreement", "tensor_parallel"],
}
LAUNCHED = [case for cases in LAUNCHES.values() for case in cases]
FLOAT32 = [case for case in LAUNCHED if case.dtype == "float32"]


def params(cases: list[Case]) -> list[Any]:
    """Of these cases, slow where their launch is."""
    return [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@functools.cache
def truth(case: Case) -> dict[str, Tensor]:
    """The dense training, once for all cases that differ only in how they are wrapped."""
    return train_densely(case)


def dense(case: Case) -> dict[str, Tensor]:
    if case.batch == "split":  # the same sequences, whoever has them
        case = replace(case, ranks=1, accumulation=1)
    common = {"wrapper": "", "exchange": "weight", "dtype": "float32", "chunk_size": 5, "teacher": "shard"}
    return truth(replace(case, **common, loss="dense"))


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    def spec(name: str) -> dict[str, Any]:
        return {"train": LAUNCHES[name], "probes": PROBES.get(name, [])}

    return Launches(exchange_worker, LAUNCHES, tmp_path_factory.mktemp, timeout_s=800, spec=spec)


@pytest.fixture
def result_of(launches: Launches) -> Callable[..., Any]:
    """What was written about a case, or by a probe: (launch, name)."""

    def load(case: Case | None = None, probe: tuple[str, str] = ("", "")) -> Any:
        return launches.file(probe[0], f"{probe[1]}.pt") if case is None else launches.of(case)

    return load


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("case", params(FLOAT32), ids=lambda case: case.name)
def test_every_wrapper_and_exchange_trains_like_one_dense_process(result_of: Callable[..., Any], case: Case) -> None:
    found, expected = result_of(case), dense(case)
    tolerance = 1e-6 if case.batch == "split" else 1e-5
    assert distance(found["parameters"], expected) < tolerance
    start = dict(make_models(case)[0].named_parameters())
    assert max((start[name] - value).abs().max() for name, value in expected.items()) > 1e-3


@pytest.mark.parametrize(
    ("wrapper", "tied", "ranks"),
    [*HALF[:FEW_HALF], *(pytest.param(*which, marks=pytest.mark.slow) for which in HALF[FEW_HALF:])],
)
def test_bf16_errs_as_much_as_the_wrapper_with_a_dense_loss(
    result_of: Callable[..., Any], wrapper: str, tied: bool, ranks: int
) -> None:
    def error(case: Case) -> float:
        found, expected = result_of(case)["parameters"], dense(case)
        return sum(float((found[name].double() - value).square().sum()) for name, value in expected.items()) ** 0.5

    errors = {name: sum(map(error, cases)) for name, cases in half(wrapper, tied=tied, ranks=ranks).items()}
    assert errors["dense"] > 1e-3, "bf16 that changes nothing would test nothing"
    for mode in MODES:
        assert errors[mode] <= 1.2 * errors["dense"], errors


SHARDED = [case for case in LAUNCHED if case.wrapper != "ddp" and case.loss == "attached" and case.ranks > 1]
SHARDED = [case for case in SHARDED if case.teacher != "part" or case.wrapper in ("fsdp1", "zero3")]  # else not cut


@pytest.mark.parametrize("case", params(SHARDED), ids=lambda case: case.name)
def test_the_teacher_is_sharded_again_after_each_step(result_of: Callable[..., Any], case: Case) -> None:
    assert result_of(case)["whole_in_teacher"] == []


@pytest.mark.parametrize("case", [case for case in LAUNCHES["four"] if case.batch == "ragged"], ids=lambda c: c.name)
def test_ragged_ranks_wait_for_nobody(result_of: Callable[..., Any], case: Case) -> None:
    found = [int((make_batch(case, 0, 0, rank)[1][:, 1:] != -100).sum()) for rank in range(4)]
    assert tuple(found) == RAGGED and count_valid(case, 0) == sum(RAGGED)
    assert result_of(case)["seconds"] < 20


def test_statistics_never_send_a_head_or_its_gradient(result_of: Callable[..., Any]) -> None:
    rows = -(-probes.VOCAB_SIZE // 2) * 2
    for calls in result_of(probe=("torch", "head_collectives")):
        for mode, times in (("weight", 1), ("stats", 0)):
            for head in ("student head", "teacher head"):
                assert sum(call.parameter == head for call in calls[mode]) == times, (mode, head)
            reduced = [call for call in calls[mode] if "reduce_scatter" in call.operation]
            assert sum(call.numel == rows * probes.STUDENT_WIDTH for call in reduced) == times
            largest = max(call.numel for call in calls[mode])
            assert (largest >= rows // 2 * probes.STUDENT_WIDTH) == (mode == "weight")


@pytest.mark.parametrize("name", ["torch", "four"])
def test_one_collective_settles_the_chunks_and_counts_the_tokens(result_of: Callable[..., Any], name: str) -> None:
    for found in result_of(probe=(name, "counting")):
        for exchange, ways in found.items():
            (counted, calls), (given, fewer) = ways["counted"], ways["given"]
            assert counted == pytest.approx(LAUNCHES[name][0].ranks * given, rel=1e-6)
            assert len(calls) - len(fewer) == (exchange == "weight")
            assert len(calls) > 2


def test_a_chunk_of_statistics_takes_one_round_or_two(result_of: Callable[..., Any]) -> None:
    """Besides the gather of the hidden states and the reduction of their gradient."""
    for found in result_of(probe=("torch", "rounds")):
        for divergence, rounds in probes.ROUNDS.items():
            gathers = ["_allgather_base_", "_allgather_base_"]
            expected = [*gathers, "_reduce_scatter_base_"] + ["allreduce_"] * (rounds - 1)
            assert sorted(expected) == found[divergence], divergence


@pytest.mark.parametrize("name", ["torch", "four"])
def test_statistics_leave_no_rank_with_a_whole_head_or_row_of_logits(result_of: Callable[..., Any], name: str) -> None:
    ranks = LAUNCHES[name][0].ranks
    for shapes in result_of(probe=(name, "memory")):
        vocab_size = probes.VOCAB_SIZE
        assert max(torch.Size(shape).numel() for shape in shapes) < vocab_size * probes.STUDENT_WIDTH
        matrices = [shape for shape in shapes if len(shape) > 1]  # the settings travel as a row of bytes
        assert not [shape for shape in matrices if any(size >= vocab_size for size in shape)]
        columns = -(-vocab_size // ranks)
        assert any(shape[-1:] in ((columns,), (vocab_size - columns * (ranks - 1),)) for shape in shapes)


def test_bytes_on_the_wire_are_those_of_the_formulas(result_of: Callable[..., Any]) -> None:
    large = cost.Head(probes.TRAFFIC_VOCAB, probes.TRAFFIC_WIDTH, 4, item_bytes=4, reduced_bytes=4)
    small = cost.Head(probes.LOGITS_VOCAB, probes.LOGITS_WIDTH, 4, item_bytes=4, reduced_bytes=4)
    rows = probes.TRAFFIC_ROWS
    expected = {
        "weight": cost.weight_bytes(large, large._replace(reduced_bytes=0)),
        "stats": cost.stats_bytes(large, large, rows, ranks=4, numbers=probes.NUMBERS),
        "logits": cost.logits_bytes(small, small, probes.LOGITS_ROWS, ranks=4),
    }
    for counted in result_of(probe=("four", "traffic")):
        assert counted == pytest.approx(expected, rel=0.05)
        assert 4 * counted["stats"] < counted["weight"]


def test_copies_of_sharded_models_exchange_within_their_group(result_of: Callable[..., Any]) -> None:
    found = result_of(probe=("four", "groups"))
    for rank, sizes in enumerate(found):
        group = (0, 1) if rank < 2 else (2, 3)
        copies = (rank % 2, rank % 2 + 2)
        assert sizes["forward"] == {group}
        assert sizes["backward"] == {group, copies}, "the gradient of its rows goes to the other copy"


def volumes_of(ranks: int, student_ranks: int, teacher_ranks: int, *, rows: int, reduced: int = 4) -> dict[str, float]:
    student = cost.Head(probes.VOCAB_SIZE, probes.STUDENT_WIDTH, student_ranks, 4, reduced)
    teacher = cost.Head(probes.VOCAB_SIZE, probes.TEACHER_WIDTH, teacher_ranks, 4)
    return cost.volumes(student, teacher, rows, ranks=ranks, numbers=probes.NUMBERS)


MANY, FEW = probes.AUTO_ROWS
SHARDED_BYTES = volumes_of(4, 4, 4, rows=MANY)
# launch, layout: the mode, the bytes of each, words of the line that says it
AUTOMATIC: dict[tuple[str, str], tuple[str, dict[str, float], str]] = {
    ("four", "sharded"): ("stats", SHARDED_BYTES, "W 4, "),
    ("four", "replicated"): ("weight", volumes_of(4, 4, 1, rows=MANY), "the teacher's head is there anyway"),
    ("four", "tied"): ("weight", volumes_of(4, 4, 1, rows=MANY), "the teacher's head is there anyway"),
    ("four", "frozen"): ("weight", volumes_of(4, 4, 4, rows=MANY, reduced=0), "the student's head is frozen"),
    ("four", "groups"): ("stats", volumes_of(2, 2, 2, rows=MANY), "W 2, "),
    ("four", "student tied"): ("stats", volumes_of(4, 1, 4, rows=FEW), "the student's head is whole in each"),
    ("four", "ddp"): ("stats", volumes_of(4, 1, 4, rows=FEW), "the student's head is whole in each"),
    ("four", "fsdp1"): ("weight", volumes_of(4, 1, 4, rows=MANY), "the student's head is whole in each"),
    ("deepspeed", "zero3"): ("stats", volumes_of(2, 1, 2, rows=FEW), "the student's head is whole in each"),
}


@pytest.mark.parametrize(("launch_name", "layout"), AUTOMATIC)
def test_auto_counts_what_weight_really_gathers(result_of: Callable[..., Any], launch_name: str, layout: str) -> None:
    mode, sizes, words = AUTOMATIC[launch_name, layout]
    everyone = result_of(probe=(launch_name, "automatic_zero3" if layout == "zero3" else "automatic"))
    assert [found[layout][0] for found in everyone] == [mode] * LAUNCHES[launch_name][0].ranks
    (message,) = everyone[0][layout][1:]
    assert all(len(found[layout]) == 1 for found in everyone[1:]), "only rank 0 speaks"
    assert words in message
    assert all(f"{exchange_mode} {size / 1e6:.4g} MB" in message for exchange_mode, size in sizes.items())
    assert min(sizes, key=lambda name: sizes[name]) == mode


def test_a_teacher_that_is_whole_saves_its_gather() -> None:
    saved = SHARDED_BYTES["weight"] - volumes_of(4, 4, 1, rows=MANY)["weight"]
    assert saved == pytest.approx(3 / 4 * probes.VOCAB_SIZE * probes.TEACHER_WIDTH * 4)


@pytest.mark.parametrize("name", ["torch", "four"])
def test_every_exchange_gives_the_same_numbers(result_of: Callable[..., Any], name: str) -> None:
    for found in result_of(probe=(name, "agreement")):
        for mode in ("logits", "stats"):
            for one, other in zip(found[mode], found["weight"], strict=True):
                assert (one - other).abs().max() <= 1e-9 * other.abs().max()


def test_every_exchange_gives_a_larger_student_the_same_numbers(result_of: Callable[..., Any]) -> None:
    """Losses, the head's gradient, metrics, and the bytes of the logits that never were; also where rank 1 has nothing
    of the teacher's head."""
    for found in result_of(probe=("torch", "larger_student")):
        assert len(found) == len(probes.LARGER) * len(probes.SMALLER_TEACHERS) * len(MODES)
        for (name, size, _), (loss, gradient, metrics) in found.items():
            expected_loss, expected_gradient, expected_metrics = found[name, size, "weight"]
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            assert (gradient - expected_gradient).abs().max() <= 1e-9 * expected_gradient.abs().max()
            assert metrics == pytest.approx(expected_metrics, rel=1e-9, abs=1e-12)


def test_a_compiled_student_trains_on_several_ranks(result_of: Callable[..., Any]) -> None:
    """Settling what the ranks agree on is left to eager code."""
    for found in result_of(probe=("torch", "compiled")):
        assert len(found) == 6
        for name, (loss, plain) in found.items():
            assert loss == pytest.approx(plain, rel=1e-5), name


def test_what_is_written_to_a_teacher_between_steps_counts_in_every_exchange(result_of: Callable[..., Any]) -> None:
    """Its rows are kept where it is whole: not beyond a change of them, as by a moving average of the student."""
    for found in result_of(probe=("torch", "following_teacher")):
        assert len(found) == 3 * len(MODES)
        for losses in found.values():
            assert all(loss == pytest.approx(expected, rel=1e-9) for loss, expected in losses)
            assert len({round(expected, 6) for _, expected in losses}) > 1


@pytest.mark.parametrize("name", ["torch", "four"])
def test_a_tensor_parallel_teachers_slices_are_its_logits(result_of: Callable[..., Any], name: str) -> None:
    for found in result_of(probe=(name, "tensor_parallel")):
        assert len(found) == 6
        assert max(found.values()) < 1e-12, found


def test_a_partitioned_head_outside_of_its_forward_is_refused_by_name(result_of: Callable[..., Any]) -> None:
    for message in result_of(probe=("deepspeed", "outside_zero3")):
        assert "ZeRO-3 or FSDP1 has partitioned it away" in message
        assert "kd_plugin.attach(student, teacher, config) before deepspeed.initialize" in message


def test_slices_of_logits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ShardedLogits got \(2, 3, 5\); wanted \[rows, columns of this rank\]"):
        kd.ShardedLogits(torch.zeros(2, 3, 5), widths=[5])
    teacher = kd.ShardedLogits(torch.zeros(4, 5), group=object(), widths=[5])
    with pytest.raises(ValueError, match="ShardedLogits has 4 rows, the student 3"):
        teacher.prepare(local_plan(None, 3, 2), 5, torch.float32)


def test_shard_groups_must_divide_the_ranks() -> None:
    with pytest.raises(ShardingError, match="shard_size is 3, wanted a divisor of 4 ranks: choose one of 1, 2, 4"):
        make_mesh("cpu", 4, shard_size=3)
    with pytest.raises(ShardingError, match="shard_size is 0"):
        make_mesh("cpu", 4, shard_size=0)


@pytest.mark.parametrize("launch_name", ["torch", "four"])
def test_ranks_that_do_not_fit_together_are_refused_by_name(result_of: Callable[..., Any], launch_name: str) -> None:
    words = {name: f"distill.{name}" for name in ("divergence", "exchange", "chunk_size", "metrics", "loss_memory_mb")}
    words |= {
        f"{side} {what}": f"the {side}'s {what}" for side in ("student", "teacher") for what in ("vocabulary", "width")
    }
    words |= {"dtype": "the dtype of the student's head"}
    ranks = LAUNCHES[launch_name][0].ranks
    for found in result_of(probe=(launch_name, "mismatch")):
        assert {unit for _, unit in found} == set(probes.UNITS)
        for (planted, _), (message, seconds) in found.items():
            name = planted.split(",")[0]
            assert words.get(name, name) in message, planted
            assert f"rank {ranks - 1}:" in message and "\n" not in message, message
            assert seconds < 10


def test_what_waits_for_the_first_step_neither_hangs_a_rank_alone_nor_stays(result_of: Callable[..., Any]) -> None:
    for found in result_of(probe=("torch", "hooks")):
        assert found == {"ddp": 0, "copies": 0, "fsdp2 root": 0}
