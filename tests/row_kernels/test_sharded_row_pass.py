"""A row cut over ranks gives what the whole row gives, whatever is in the parts, in the promised number of rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.distributed.vocab_slice import Sizes
from kd_plugin.divergences.definition import Row
from kd_plugin.divergences.objective import Objective, make_objective
from kd_plugin.divergences.registry import DIVERGENCES, get
from kd_plugin.row_kernels import sharded_dispatch
from kd_plugin.row_kernels.row_pass import LogitTransform, RowSpec, row_pass, subtract_labels
from kd_plugin.row_kernels.sharded_numbers import exchanged_numbers
from kd_plugin.row_kernels.sharded_row_pass import merge_moments

ROWS, VOCAB = 6, 23
BY_ID = [name for name in DIVERGENCES if not get(name).sorts]
CUTS = {"even": (0, 12, 23), "uneven": (0, 1, 9, 22, 23), "with empty parts": (0, 0, 23, 23), "whole": (0, 23)}


@dataclass
class Rows:
    """One chunk."""

    spec: RowSpec
    student: Tensor  # [ROWS, VOCAB]
    teacher: Tensor | None  # [ROWS, V'], V' <= VOCAB
    targets: Tensor  # [ROWS, 1]
    weights: Tensor = field(default_factory=lambda: torch.linspace(0, 2, ROWS, dtype=torch.float64)[:, None])
    hard_weights: Tensor | None = None

    @property
    def of_labels(self) -> Tensor:
        return self.weights if self.hard_weights is None else self.hard_weights

    def whole(self) -> tuple[Tensor, Tensor]:
        """-> statistics, gradient."""
        student, hard = self.student.clone(), bool(self.spec.objective.hard_weight)
        logits = student.gather(1, self.targets) if hard else None
        statistics = row_pass(self.spec, student, self.teacher, logits, self.weights, self.hard_weights)
        if hard:
            subtract_labels(self.spec, student, self.targets, logits, self.of_labels)
        return statistics, student

    def cut(self, bounds: tuple[int, ...], kernel: str = "eager") -> tuple[Tensor, Tensor]:
        """The same by one rank after the other."""
        parts = [slice(start, stop) for start, stop in pairwise(bounds)]
        cuts = [(self.student[:, p].clone(), None if self.teacher is None else self.teacher[:, p]) for p in parts]
        hard = bool(self.spec.objective.hard_weight)
        sizes = Sizes(VOCAB, VOCAB if self.teacher is None else self.teacher.shape[1])
        one = [sharded_dispatch.moments(kernel, self.spec, sizes, *cut) for cut in cuts]
        if hard:
            logits = self.student.gather(1, self.targets)
            here = [(self.targets >= p.start) & (self.targets < p.stop) for p in parts]
            one = [torch.cat([m, torch.where(h, logits, 0.0)], -1) for m, h in zip(one, here, strict=True)]
        merged = merge_moments(self.spec, sizes, torch.stack(one))
        sums = [sharded_dispatch.sums(kernel, self.spec, sizes, *cut, merged) for cut in cuts]
        numbers = exchanged_numbers(self.spec.objective, sizes.unequal)
        assert (one[0].shape[1], sums[0].shape[1]) == numbers
        given = (self.weights, merged, sum(sums), self.hard_weights)
        found = [sharded_dispatch.finish(kernel, self.spec, sizes, *cut, *given) for cut in cuts]
        count = found[0].shape[1] // 2
        assert all(torch.equal(one[:, :count], found[0][:, :count]) for one in found), "ranks must agree on the rows"
        statistics = found[0][:, :count] + sum(one[:, count:] for one in found)
        gradient = torch.cat([student for student, _ in cuts], 1)
        if hard:
            subtract_labels(self.spec, gradient, self.targets, logits, self.of_labels)
        return statistics, gradient


def make_rows(
    config: kd.DistillConfig, *, apart: float = 1.0, dtype: torch.dtype = torch.float64, teacher_size: int = VOCAB
) -> Rows:
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    student = teacher + apart * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (ROWS, 1), generator=generator)
    spec = RowSpec(make_objective(config), LogitTransform(0.5, 30.0), LogitTransform(2.0))
    teacher = teacher[:, :teacher_size].to(dtype) if config.soft_weight else None
    rows = Rows(spec, student.to(dtype), teacher, targets)
    rows.weights = rows.weights.to(dtype)
    return rows


def check(rows: Rows, bounds: tuple[int, ...], kernel: str = "eager", tolerance: float = 1e-12) -> None:
    for found, expected in zip(rows.cut(bounds, kernel), rows.whole(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bounds", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", BY_ID)
def test_parts_of_a_row_together_give_the_whole_rows_values_and_gradients(name: str, bounds: tuple[int, ...]) -> None:
    config = kd.DistillConfig(divergence=name, temperature=2.0, soft_weight=0.7, hard_weight=0.3)
    check(make_rows(config), bounds)
    check(make_rows(config, teacher_size=16), bounds)  # some parts of which the teacher has nothing
    check(make_rows(config.model_copy(update={"temperature": 1.0}), teacher_size=16), bounds)


OBJECTIVES = {
    "several terms": {"terms": [{"name": n, "weight": w} for n, w in (("reverse_kl", 0.5), ("tvd", 1), ("jsd", 2))]},
    "temperatures": {"terms": [{"name": "reverse_kl", "temperature": t} for t in (1.0, 2.0, 3.0)]},
    "smoothed, z-loss": {"hard_weight": 1.0, "label_smoothing": 0.1, "z_loss_weight": 0.01},
    "soft only": {"hard_weight": 0.0, "divergence": "skew_kl"},
    "no metrics": {"metrics": False},
    "soft only, no metrics": {"hard_weight": 0.0, "metrics": False},
    "hard only": {"soft_weight": 0.0, "hard_weight": 1.0},
}


@pytest.mark.parametrize("teacher_size", [VOCAB, 16, 9])
@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
def test_so_do_other_objectives(settings: dict[str, object], teacher_size: int) -> None:
    check(make_rows(kd.DistillConfig(**settings), teacher_size=teacher_size), CUTS["uneven"])


@pytest.mark.parametrize(("bounds", "teacher_size"), [(CUTS["with empty parts"], VOCAB), ((0, 20, 23), 16)])
def test_compiled_parts_do_what_eager_ones_do(bounds: tuple[int, ...], teacher_size: int) -> None:
    terms = [{"name": name} for name in ("reverse_kl", "jsd")]
    rows = make_rows(kd.DistillConfig(terms=terms), dtype=torch.float32, teacher_size=teacher_size)
    check(rows, bounds, "compile", 1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "soft_ce", "logit_mse"])
def test_kls_cross_entropy_and_logit_distance_take_one_round(name: str) -> None:
    assert exchanged_numbers(make_objective(kd.DistillConfig(divergence=name)))[1] == 0


def test_the_others_take_two_rounds() -> None:
    for name in set(BY_ID) - {"forward_kl", "reverse_kl", "soft_ce", "logit_mse"}:
        assert exchanged_numbers(make_objective(kd.DistillConfig(divergence=name)))[1] > 0, name


@pytest.mark.parametrize("name", [name for name in BY_ID if get(name).gradient_without_sums])
def test_gradients_said_to_read_no_sums_read_none(name: str) -> None:
    x = torch.linspace(-1, 1, 6).view(2, 3)
    row = Row(x, -x, x.log_softmax(-1), (-x).log_softmax(-1), x.softmax(-1), (-x).softmax(-1), 3)
    unknown = (torch.full((2, 1), math.nan),)
    assert get(name).gradient(torch, row, unknown).isfinite().all()
    assert len(get(name).elements(torch, row)) == 1
    assert torch.equal(get(name).value(torch, (x[:, :1],)), x[:, :1])


def test_models_that_nearly_agree_keep_their_digits_in_one_round() -> None:
    """reverse_kl merged from sums of exp(s) (s - t) would lose all of them: the KL is 1e-9, the logits about 3."""
    config = kd.DistillConfig(divergence="reverse_kl", hard_weight=0.0, soft_weight=1.0)
    exact = make_rows(config, apart=1e-4)
    exact.spec = exact.spec._replace(student=LogitTransform(), teacher=LogitTransform())
    single = Rows(exact.spec, exact.student.float(), exact.teacher.float(), exact.targets, exact.weights.float())
    truth = Rows(exact.spec, single.student.double(), single.teacher.double(), exact.targets, exact.weights).whole()
    for found, whole, expected in zip(single.cut(CUTS["uneven"]), single.whole(), truth, strict=True):
        error, unavoidable = ((x.double() - expected).norm() for x in (found, whole))
        assert error <= 2 * unavoidable


@pytest.mark.parametrize("name", BY_ID)
def test_masked_token_ids_are_masked_in_parts_too(name: str) -> None:
    config = kd.DistillConfig(divergence=name, soft_weight=0.7, hard_weight=0.3)
    rows = make_rows(config)
    rows.spec = rows.spec._replace(student=LogitTransform(), teacher=LogitTransform())
    rows.student[:, :9] = rows.teacher[:, :9] = -math.inf  # one part and a bit
    rows.targets.clamp_(min=9)
    check(rows, (0, 7, 15, 23))


def test_a_part_without_teacher_mass_counts_as_in_the_whole_row() -> None:
    rows = make_rows(kd.DistillConfig(divergence="reverse_kl"))
    rows.teacher[:, :7] = -math.inf
    check(rows, (0, 7, 15, 23), tolerance=1e-4)


def test_a_tie_for_the_most_likely_token_counts_once() -> None:
    rows = make_rows(kd.DistillConfig())
    rows.student[:, (2, 20)] = rows.teacher[:, (2, 20)] = 20.0
    rows.student[0, 2] = rows.teacher[0, 20] = 19.0  # apart
    agreement = rows.cut(CUTS["uneven"])[0][:, 4]
    assert agreement.tolist() == [0, *[1] * (ROWS - 1)]


def objective_of(**settings: object) -> Objective:
    return make_objective(kd.DistillConfig(**settings))


def test_numbers_per_row_are_as_documented() -> None:
    """Two per softmax, one each for the label's logit, agreement, and a reverse KL."""
    assert exchanged_numbers(objective_of()) == (6, 0)
    assert exchanged_numbers(objective_of(temperature=2.0)) == (10, 0)
    assert exchanged_numbers(objective_of(divergence="reverse_kl", metrics=False)) == (6, 0)
    assert exchanged_numbers(objective_of(divergence="jsd", metrics=False, hard_weight=0.0)) == (4, 2)


def test_a_student_with_more_token_ids_has_one_more_softmax_at_temperature_1() -> None:
    """Over all of its ids; that over the ids of both is left out where the temperature is another."""
    assert exchanged_numbers(objective_of(), True) == (8, 0)
    assert exchanged_numbers(objective_of(temperature=2.0), True) == (10, 0)
    assert exchanged_numbers(objective_of(hard_weight=0.0, metrics=False), True) == (4, 0)


@pytest.mark.parametrize("kernel", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("teacher_size", [VOCAB, 17])
def test_each_loss_may_have_weights_of_its_own(kernel: str, teacher_size: int) -> None:
    config = kd.DistillConfig(divergence="jsd", temperature=2.0, label_smoothing=0.1, z_loss_weight=0.01)
    rows = make_rows(config, teacher_size=teacher_size)
    rows.hard_weights = torch.linspace(3, 0, ROWS, dtype=torch.float64)[:, None]
    check(rows, CUTS["uneven"], kernel)
    with_one = make_rows(config, teacher_size=teacher_size).whole()[1]
    assert not torch.allclose(rows.whole()[1], with_one)
