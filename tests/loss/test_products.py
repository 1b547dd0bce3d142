"""Which matrix products a loss takes: what is not wanted costs none, backward costs none, none is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_plugin.loss import matmul
from tests.loss_cases import config_of, run
from tests.oracle import gradients, make_problem, relative_error

ROWS, CHUNK, CHUNKS = 31, 8, 4


class Products(TorchDispatchMode):
    """Counts matrix products, and those among them in half precision."""

    count = half_count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("mm", "addmm", "addmm_", "bmm", "matmul"):
            self.count += 1
            self.half_count += args[-1].dtype in (torch.bfloat16, torch.float16)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "settings", "each"),
    [
        (("hidden", "weight"), {}, 4),  # both models' logits, and two gradients
        (("hidden",), {}, 3),
        (("weight",), {}, 3),
        ((), {}, 2),
        (("hidden", "weight"), {"soft_weight": 0.0}, 3),
        (("hidden", "weight"), {"hard_weight": 0.0}, 4),
    ],
)
def test_products_of_a_chunk(trained: tuple[str, ...], settings: dict[str, float], each: int) -> None:
    problem = make_problem(rows=ROWS, dtype=torch.float32, ignored=())
    problem.hidden.requires_grad_("hidden" in trained)
    problem.weight.requires_grad_("weight" in trained)
    with Products() as forward:
        loss = run(problem, config_of(chunk_size=CHUNK, **settings)).loss
    assert forward.count == each * CHUNKS
    if trained:
        with Products() as backward:
            loss.backward()
        assert backward.count == 0


def test_without_gradients_only_the_logits_are_multiplied() -> None:
    with torch.no_grad(), Products() as products:
        run(make_problem(rows=ROWS, dtype=torch.float32, ignored=()), config_of(chunk_size=CHUNK))
    assert products.count == 2 * CHUNKS


def test_ignored_rows_cost_no_product() -> None:
    problem = make_problem(rows=ROWS, dtype=torch.float32, ignored=tuple(range(0, ROWS, 2)))
    with Products() as products:
        run(problem, config_of(chunk_size=CHUNK))
    assert products.count == 4 * -(-15 // CHUNK)


@pytest.mark.parametrize(("native", "half_products"), [(True, CHUNKS), (False, 0)])
def test_half_precision_is_multiplied_where_the_processor_can(
    native: bool, half_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four chunks, only the hidden states' gradient; and it is no less exact without."""
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: native)
    problem, config = make_problem(rows=ROWS, dtype=torch.bfloat16, ignored=()), config_of(chunk_size=CHUNK)
    with Products() as products:
        found = gradients(run(problem, config).loss, problem.leaves)
    assert products.half_count == half_products
    wide = problem.exact()
    for ours, exact in zip(found, gradients(wide.expected(config).loss, wide.leaves), strict=True):
        assert relative_error(ours, exact) < 0.005
