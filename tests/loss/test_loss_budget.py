"""`loss_memory_mb`: what it buys, that it is kept, and that the number reported is the memory really taken."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import kd_plugin as kd
from kd_plugin.data.packing import collate
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.loss.chunk_size import chunk_size_on, rows_per_chunk
from kd_plugin.settings.units import GIB
from tests.allocations import NewTensors, allocator_record
from tests.loss_cases import config_of, run, sums_of
from tests.oracle import Problem, make_problem
from tests.tiny_models import make_model

MIB, FLOAT = 2**20, 4
LARGE_VOCAB = 32768


@pytest.fixture(autouse=True)
def fresh_workspace() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


# -- the chunk that a budget buys ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [97, 1000, 49152, 151936, 262144])
@pytest.mark.parametrize("loss_memory_mb", [0.3, 3, 7.7, 64, 100, 512, 2000])
def test_the_largest_chunk_that_fits_a_multiple_of_64_from_64_on(loss_memory_mb: float, vocab: int) -> None:
    row = 8 * vocab
    if row > loss_memory_mb * MIB:
        with pytest.raises(ValueError, match="raise loss_memory_mb"):
            rows_per_chunk("auto", loss_memory_mb, vocab)
        return
    rows = rows_per_chunk("auto", loss_memory_mb, vocab)
    assert rows * row <= loss_memory_mb * MIB
    step = 1 if rows < 64 else 64
    assert rows % step == 0 and (rows + step) * row > loss_memory_mb * MIB


@pytest.mark.parametrize("vocab", [3, 97, 50257, 128256, 151669, 152064, 256001])
def test_a_budget_below_one_row_is_refused_with_one_that_holds_it(vocab: int) -> None:
    with pytest.raises(ValueError, match=r"does not hold one row .* raise loss_memory_mb") as error:
        rows_per_chunk("auto", 8 * vocab / MIB * 0.999, vocab)
    named = float(re.search(r"one row needs ([\d.e-]+) MiB", str(error.value)).group(1))
    assert rows_per_chunk("auto", named, vocab) == 1
    assert named < 1.02 * 8 * vocab / MIB


def test_every_entry_refuses_a_budget_below_one_row() -> None:
    problem = make_problem(vocab=1021)
    config = config_of(chunk_size="auto", loss_memory_mb=1e-3)
    logits = [hidden @ weight.T for hidden, weight in ((problem.hidden, problem.weight), tuple(problem)[2:4])]
    for call in (
        lambda: run(problem, config),
        lambda: kd.distill_loss_per_token(*problem, config=config),
        lambda: kd.distill_logits(*logits, problem.targets, config=config),
    ):
        with pytest.raises(ValueError, match=r"one row needs 0\.0\d+ MiB: raise loss_memory_mb"):
            call()


def test_a_teacher_with_a_larger_vocabulary_of_its_own_counts() -> None:
    """uld holds the teacher's rows whole."""
    problem = make_problem(rows=300, vocab=101, teacher_vocab=2011, ignored=())
    problem = Problem(*(t.detach().float() if t.is_floating_point() else t for t in problem))
    problem.hidden.requires_grad_()
    config = config_of("uld", chunk_size="auto", loss_memory_mb=0.5)
    with NewTensors() as made:
        run(problem, config).loss.backward()
    rows = max(shape[0] for shape in made.shapes if shape[1:] == (2011,))
    assert FLOAT * rows * (101 + 2011) <= 0.5 * MIB
    student, teacher = problem.hidden @ problem.weight.T, problem.teacher_hidden @ problem.teacher_weight.T
    with NewTensors() as made:
        kd.distill_logits(student, teacher, problem.targets, config=config)
    assert max(shape[0] for shape in made.shapes if shape[1:] == (2011,)) == rows == 62

    models = [make_model("llama", seed=seed, dtype=torch.float32, vocab_size=v) for seed, v in ((1, 101), (2, 2011))]
    assert kd.attach(*models, config).chunk_size == rows


# -- the memory that it takes -------------------------------------------------------------------------------


def formula(problem: Problem, rows: int) -> int:
    """The documented one: 8 * C * V bytes + dX + dW, fp32."""
    vocab = problem.weight.shape[0]
    return 8 * rows * vocab + FLOAT * (problem.hidden.numel() + problem.weight.numel())


def peak_of(problem: Problem, config: kd.DistillConfig) -> int:
    """Bytes above the inputs at the peak of forward and backward, as the allocator saw them."""
    problem.hidden.grad = problem.weight.grad = None
    release_workspace()
    return allocator_record(lambda: run(problem, config).loss.backward())[1]


@pytest.fixture(scope="module")
def large_problem() -> Problem:
    return make_problem(2048, 16, 16, LARGE_VOCAB, dtype=torch.float32, ignored=())


@pytest.mark.parametrize("loss_memory_mb", [96, 192, 400])
def test_the_measured_peak_is_the_formulas(large_problem: Problem, loss_memory_mb: float) -> None:
    """With the kernel that runs by default. It is never below, and at most 15 % above."""
    config = config_of(chunk_size="auto", loss_memory_mb=loss_memory_mb, row_kernel="compile")
    rows = rows_per_chunk("auto", loss_memory_mb, LARGE_VOCAB)
    assert rows < 2048
    small = make_problem(4, 16, 16, LARGE_VOCAB, dtype=torch.float32, ignored=())
    run(small, config).loss.backward()  # compiles
    expected = formula(large_problem, rows)
    assert expected <= peak_of(large_problem, config) <= 1.15 * expected
    assert 8 * rows * LARGE_VOCAB <= loss_memory_mb * MIB


@pytest.mark.parametrize("loss_memory_mb", [0.25, 1.0, 4.0])
def test_the_plugin_reports_it_in_gib(loss_memory_mb: float) -> None:
    """Per forward: chunk buffers, the hidden states' gradient, the head's gradient."""
    vocab, batch, length = 1021, 25, 32
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32, vocab_size=vocab) for seed in (1, 2))
    config = kd.DistillConfig(loss_memory_mb=loss_memory_mb, row_kernel="eager")
    ids = torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    plugin = kd.attach(student, teacher, config)
    student(input_ids=ids, labels=ids).loss.backward()
    metrics = plugin.metrics()
    plugin.detach()
    rows, width = rows_per_chunk("auto", loss_memory_mb, vocab), 32
    assert rows < batch * (length - 1) and metrics["chunk_size"] == rows
    expected = 8 * rows * vocab + FLOAT * (batch * length * width + vocab * width)
    assert metrics["loss_peak_gib"] * GIB == pytest.approx(expected, rel=1e-12)
    assert metrics["logits_avoided_gib"] * GIB == pytest.approx(8 * batch * (length - 1) * vocab, rel=1e-12)


def test_rows_enter_only_through_the_hidden_states_gradient() -> None:
    """From 2048 to 8192 rows: dX and an index per row, while the logits would grow by megabytes."""
    width, vocab, peaks = 16, 509, []
    config = config_of(chunk_size=64)
    run(make_problem(64, width, width, vocab, dtype=torch.float32), config).loss.backward()
    for rows in (2048, 8192):
        problem = make_problem(rows, width, width, vocab, dtype=torch.float32, ignored=(5, 77))
        peaks.append(peak_of(problem, config))
    growth, more = peaks[1] - peaks[0], 8192 - 2048
    assert FLOAT * width * more <= growth <= (FLOAT * width + 8 + 1) * more + 4096
    assert growth < FLOAT * vocab * more / 20


def test_masked_rows_cost_no_logits() -> None:
    items = [{"input_ids": torch.arange(3, 12).numpy(), "labels": torch.full((9,), -100).numpy()} for _ in range(4)]
    items[0]["labels"][5:7] = 7
    batch = collate(items)
    assert batch.loss_rows.tolist() == [4, 5]
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32, vocab_size=211) for seed in (1, 2))
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    release_workspace()
    with NewTensors() as made:
        student(**batch.model_inputs()).loss.backward()
    plugin.detach()
    assert max(shape[0] for shape in made.shapes if shape[1:] == (211,)) == 2


def test_the_bytes_of_each_heads_own_columns_are_counted() -> None:
    problem = make_problem(50, 8, 8, 1021, 300, dtype=torch.float32, ignored=())
    config = config_of(chunk_size="auto", loss_memory_mb=0.05)
    rows = int(0.05 * 2**20) // (4 * (1021 + 300))

    def of_sizes(student: int, teacher: int | None) -> int:
        return chunk_size_on(config, student, teacher, torch.device("cpu"), torch.float32).rows

    assert rows == of_sizes(1021, 300) == 9 > of_sizes(1021, None)
    sums = sums_of(problem, config)
    assert sums.workspace_bytes == 4 * (rows * (1021 + 300) + 50 * 8 + 1021 * 8)
    assert sums.dense_bytes == 4 * 50 * (1021 + 300)
    alone = sums_of(problem, config_of(soft_weight=0.0))
    assert alone.dense_bytes == 4 * 50 * 1021


def test_fp64_models_avoid_the_same_logits() -> None:
    problem = make_problem(50, 8, 8, 101, 30, ignored=())
    sums = sums_of(problem, config_of())
    assert sums.dense_bytes == 4 * 50 * (101 + 30)
