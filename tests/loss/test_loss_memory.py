"""No tensor of tokens x vocabulary is ever allocated: seen by a dispatch mode and by the allocator's own record."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import kd_plugin as kd
from kd_plugin.loss import matmul
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.loss.chunk_size import rows_per_chunk
from kd_plugin.loss.matmul import accumulate_outer
from kd_plugin.row_kernels import blocks
from tests.allocations import NewTensors, allocator_record
from tests.loss_cases import config_of, run, sums_of
from tests.oracle import DIVERGENCES, Problem, make_problem

# V * D and C * V are far below N * V, and N * D below C * V, so that each size can be told from the others.
ROWS, WIDTH, VOCAB, CHUNK = 640, 8, 1021, 32
BIG = ROWS * VOCAB
FLOAT = 4


@pytest.fixture(autouse=True)
def fresh_workspace() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


def problem_of(dtype: torch.dtype = torch.float32, **options: object) -> Problem:
    return make_problem(ROWS, WIDTH, 8, VOCAB, dtype=dtype, **options)


def step(problem: Problem, **settings: object) -> Callable[[], None]:
    config = config_of(**{"chunk_size": CHUNK, "row_kernel": "eager", **settings})

    def work() -> None:
        run(problem, config).loss.backward()

    return work


@pytest.mark.parametrize("ignored", [(), tuple(range(0, ROWS, 3))], ids=["all rows valid", "two thirds valid"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_operator_returns_more_than_one_chunk_of_logits(divergence: str, ignored: tuple[int, ...]) -> None:
    problem = problem_of(ignored=ignored, bias=True)
    with NewTensors() as made:
        step(problem, divergence=divergence, temperature=2.0)()
    limit = max(CHUNK * VOCAB, VOCAB * WIDTH, ROWS * WIDTH)
    assert limit < BIG / 10
    assert (CHUNK, VOCAB) in made.shapes
    assert max(made.numels.values()) <= limit


def test_the_dense_reference_does_allocate_it() -> None:
    """The measurement would notice."""
    problem = problem_of(ignored=())

    def work() -> None:
        kd.reference.distill_loss(*problem, config=config_of()).loss.backward()

    with NewTensors() as made:
        work()
    assert max(made.numels.values()) >= BIG
    assert allocator_record(work)[0] >= BIG * FLOAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_kernel", ["eager", "compile"])
def test_the_allocator_never_hands_out_tokens_times_vocabulary(row_kernel: str, dtype: torch.dtype) -> None:
    largest, _ = allocator_record(step(problem_of(dtype), row_kernel=row_kernel))
    most = 2 * max(CHUNK * VOCAB, VOCAB * WIDTH)  # twice: products pack operands, more of them on more threads
    assert largest <= most * FLOAT < BIG * FLOAT / 5


def expected_peak(rows: int, chunk: int, *, head: bool = True) -> int:
    """8 * C * V + dX + dW in fp32."""
    return 8 * chunk * VOCAB + FLOAT * rows * WIDTH + (FLOAT * VOCAB * WIDTH if head else 0)


@pytest.mark.parametrize("trained_head", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("chunk", [32, 128])
def test_peak_memory_of_the_compiled_loss_is_the_formulas(
    chunk: int, trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it, the compiled kernel holds three arrays of the few rows that it works on at a time, and the library
    of the products what it packs operands into."""
    block = 2 * 8 * VOCAB
    monkeypatch.setitem(blocks._BLOCK_BYTES, "cpu", block)
    problem = problem_of(ignored=())
    problem.weight.requires_grad_(trained_head)
    work = step(problem, row_kernel="compile", chunk_size=chunk)
    work()  # compiles
    problem.hidden.grad = problem.weight.grad = None
    release_workspace()
    _, peak = allocator_record(work)
    formula = expected_peak(ROWS, chunk, head=trained_head)
    scratch = 3 * block // 2 * 3 // 2  # a last block may have one row more
    small = 8 * ROWS + 4096 + chunk * 200  # row indices, statistics, the chunk's hidden states
    gradient, hidden, total = torch.ones(chunk, VOCAB), torch.ones(chunk, WIDTH), torch.ones(VOCAB, WIDTH)
    _, packed = allocator_record(lambda: accumulate_outer(total, gradient, gradient, hidden, first=False))
    assert packed < 8 * chunk * VOCAB
    assert formula <= peak <= formula + scratch + small + packed


def test_peak_memory_grows_with_the_rows_by_the_hidden_gradient_alone() -> None:
    peaks = []
    for rows in (256, 1024):
        problem = make_problem(rows, WIDTH, 8, VOCAB, dtype=torch.float32, ignored=())
        work = step(problem, row_kernel="compile")
        work()
        problem.hidden.grad = problem.weight.grad = None
        release_workspace()
        peaks.append(allocator_record(work)[1])
    assert peaks[1] - peaks[0] == pytest.approx(FLOAT * WIDTH * 768, rel=0.6)  # + an index per row
    assert peaks[1] - peaks[0] < FLOAT * VOCAB * 768 / 50


def test_the_reported_workspace_is_what_was_allocated() -> None:
    problem = problem_of(ignored=())
    config = config_of(chunk_size=CHUNK)
    sums = sums_of(problem, config)
    assert sums.workspace_bytes == expected_peak(ROWS, CHUNK)
    assert sums.dense_bytes == 2 * BIG * FLOAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reported_workspace_is_what_the_allocator_saw(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the copies in fp32 of half-precision heads; with products in fp32, of which libraries make no copy."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: False)
    monkeypatch.setitem(blocks._BLOCK_BYTES, "cpu", 2 * 8 * VOCAB)
    problem = problem_of(dtype, ignored=())
    config = config_of(chunk_size=CHUNK, row_kernel="compile")
    sums_of(problem, config)  # compiles
    release_workspace()
    sums = []
    _, peak = allocator_record(lambda: sums.append(sums_of(problem, config)))
    gradient, hidden, total = torch.ones(CHUNK, VOCAB), torch.ones(CHUNK, WIDTH), torch.ones(VOCAB, WIDTH)
    _, packed = allocator_record(lambda: accumulate_outer(total, gradient, gradient, hidden, first=False))
    assert sums[0].workspace_bytes <= peak <= 1.25 * sums[0].workspace_bytes + packed


def test_the_next_step_uses_the_same_buffers_and_clears_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks._BLOCK_BYTES, "cpu", 2 * 8 * VOCAB)  # few rows at a time, to be told from chunks
    problem = problem_of(ignored=())
    work = step(problem)
    work()
    problem.hidden.grad = problem.weight.grad = None
    cleared: list[int] = []

    class Cleared(NewTensors):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._opname == "zero_":
                cleared.append(args[0].numel())
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Cleared() as made:
        work()
    assert (VOCAB, WIDTH) in made.shapes, "the gradient of the head is the caller's"
    assert not [shape for shape in made.shapes if shape[-1:] == (VOCAB,) and shape[0] >= CHUNK // 2]
    assert max(cleared, default=0) == 0, "the first chunk writes it"


@pytest.mark.parametrize("loss_memory_mb", [0.1, 1.0, 3.0])
def test_loss_memory_bounds_the_chunk_buffers(loss_memory_mb: float) -> None:
    rows = rows_per_chunk("auto", loss_memory_mb, VOCAB)
    assert 8 * rows * VOCAB <= loss_memory_mb * 2**20 < 8 * (rows + 64) * VOCAB
    with NewTensors() as made:
        step(problem_of(), chunk_size="auto", loss_memory_mb=loss_memory_mb)()
    assert max(shape[0] for shape in made.shapes if len(shape) == 2 and shape[1] == VOCAB) == min(rows, 636)


@pytest.mark.parametrize(("chunk_size", "expected"), [(1, 1), (7, 7), (10**6, 10**6)])
def test_a_given_chunk_size_is_taken_as_it_is(chunk_size: int, expected: int) -> None:
    assert rows_per_chunk(chunk_size, 1e-9, VOCAB) == expected


def test_the_automatic_chunk_is_a_multiple_of_64_where_it_is_large() -> None:
    assert rows_per_chunk("auto", 512, 49152) == 1344
    assert rows_per_chunk("auto", 8, 49152) == 21


def test_memory_that_holds_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not hold one row of 1000000 logits.*raise loss_memory_mb"):
        rows_per_chunk("auto", 1, 10**6)
    with pytest.raises(ValueError, match="raise loss_memory_mb"):
        run(problem_of(), config_of(chunk_size="auto", loss_memory_mb=1e-3))
