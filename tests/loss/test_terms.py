"""Several divergences in one pass: equal to the sum of single runs, and what cannot be composed is refused."""

from __future__ import annotations

import pytest
import torch

import kd_plugin as kd
from tests.loss_cases import check, run
from tests.oracle import gradients, make_problem, relative_error

SETTINGS = {"soft_weight": 0.7, "hard_weight": 0.4, "chunk_size": 4, "row_kernel": "eager"}


def composed(*terms: dict[str, object], **settings: object) -> kd.DistillConfig:
    return kd.DistillConfig(terms=terms, **{**SETTINGS, **settings})


MIXTURES: dict[str, tuple[dict[str, object], ...]] = {
    "one": ({"name": "reverse_kl"},),
    "two temperatures": ({"name": "forward_kl", "weight": 0.7}, {"name": "reverse_kl", "temperature": 0.5}),
    "one divergence at three temperatures": tuple(
        {"name": "forward_kl", "weight": 0.5 / t, "temperature": t} for t in (1.0, 2.0, 8.0)
    ),
    "one divergence with two shares": ({"name": "jsd", "beta": 0.1}, {"name": "jsd", "beta": 0.9, "weight": 2.0}),
    "own alpha and the common one": ({"name": "skew_kl", "alpha": 0.4}, {"name": "skew_reverse_kl"}),
    "probabilities and logits": (
        {"name": "tvd", "weight": 0.2},
        {"name": "cosine", "weight": 3.0, "temperature": 2.0},
        {"name": "logit_mse_centered", "weight": 0.01},
    ),
    "several uld": ({"name": "uld"}, {"name": "uld", "temperature": 3.0, "weight": 0.3}),
    "a term without weight": ({"name": "tvd"}, {"name": "jsd", "weight": 0.0}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_terms_equal_the_oracle(mixture: str) -> None:
    problem = make_problem(vocab=11, teacher_vocab=14, bias=True)
    for chunk_size in (1, 4, 64):
        config = composed(*MIXTURES[mixture], temperature=1.5, beta=0.3, alpha=0.2, chunk_size=chunk_size)
        check(problem, config, tolerance=1e-12, scale=0.37)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_terms_equal_the_weighted_sum_of_single_runs(mixture: str) -> None:
    problem = make_problem(bias=True)
    out = run(problem, composed(*MIXTURES[mixture], temperature=1.5))
    found = gradients(out.loss, problem.leaves)
    hard = run(problem, kd.DistillConfig(**{**SETTINGS, "soft_weight": 0}))
    value, sums = 0.0, [torch.clone(g) for g in gradients(hard.loss, problem.leaves)]
    for term in MIXTURES[mixture]:
        own = {key: term[key] for key in ("beta", "alpha") if key in term}
        single = run(
            problem,
            kd.DistillConfig(
                divergence=term["name"],
                temperature=term.get("temperature", 1.5),
                **{**SETTINGS, "hard_weight": 0},
                **own,
            ),
        )
        weight = term.get("weight", 1.0)
        value += weight * single.soft_loss.item()
        for total, grad in zip(sums, gradients(single.loss, problem.leaves), strict=True):
            total += weight * grad
    assert out.soft_loss.item() == pytest.approx(value, rel=1e-12)
    for pair in zip(found, sums, strict=True):
        assert relative_error(*pair) < 1e-12


def test_each_terms_own_temperature_has_its_own_power() -> None:
    """2 ** power for the one, 3 ** power for the other."""
    problem = make_problem()
    terms = ({"name": "forward_kl", "temperature": 2.0}, {"name": "jsd", "temperature": 3.0})
    for power in (0, 1, 2):
        check(problem, composed(*terms, temperature_power=power), tolerance=1e-12)
    parts = [run(problem, composed(term, temperature_power=0, hard_weight=0)).soft_loss.item() for term in terms]
    whole = run(problem, composed(*terms, temperature_power=2)).soft_loss.item()
    assert whole == pytest.approx(4 * parts[0] + 9 * parts[1], rel=1e-12)


def test_metrics_stay_at_temperature_1() -> None:
    problem = make_problem()
    plain = run(problem, kd.DistillConfig(**SETTINGS)).metrics
    out = run(problem, composed({"name": "tvd", "temperature": 4.0}, {"name": "jsd", "temperature": 2.0}))
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {name: value.item() for name, value in plain.items()}, rel=1e-12
    )
    assert set(run(problem, composed({"name": "uld"})).metrics) == {"teacher_entropy", "student_entropy"}


def test_logits_and_reference_take_terms_too() -> None:
    problem = make_problem(ignored=(1,))
    config = composed(*MIXTURES["probabilities and logits"], label_smoothing=0.1)
    expected = problem.expected(config)
    student, teacher = problem.hidden @ problem.weight.T, problem.teacher_hidden @ problem.teacher_weight.T
    for out in (
        kd.distill_logits(student, teacher, problem.targets, config=config),
        kd.reference.distill_logits(student, teacher, problem.targets, config=config),
        kd.reference.distill_loss(*problem, config=config),
    ):
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True):
            assert relative_error(*pair) < 1e-12


BAD: dict[str, tuple[dict[str, object], str]] = {
    "all weights zero": ({"terms": [{"name": "tvd", "weight": 0}]}, "terms has no term with a weight > 0"),
    "no term": ({"terms": []}, "terms (is an empty list|has no term)"),
    "negative weight": ({"terms": [{"name": "tvd", "weight": -1}]}, "greater than or equal to 0"),
    "infinite weight": ({"terms": [{"name": "tvd", "weight": float("inf")}]}, "finite number"),
    "weight NaN": ({"terms": [{"name": "tvd", "weight": float("nan")}]}, "finite number|greater than or equal"),
    "unknown": ({"terms": [{"name": "twd"}]}, "no such divergence; did you mean 'tvd'"),
    "misspelt key": ({"terms": [{"name": "tvd", "wieght": 1}]}, "unknown setting"),
    "no name": ({"terms": [{"weight": 1}]}, "Field required"),
    "beside divergence": (
        {"terms": [{"name": "tvd"}], "divergence": "jsd"},
        "terms replaces divergence: keep one of them",
    ),
    "uld mixed": (
        {"terms": [{"name": "uld"}, {"name": "tvd"}]},
        "uld pairs tokens in order of probability, .*: use it alone",
    ),
    "temperature 0": ({"terms": [{"name": "tvd", "temperature": 0}]}, "greater than 0"),
    "temperature below 0": ({"terms": [{"name": "tvd", "temperature": -2}]}, "greater than 0"),
    "alpha 1": ({"terms": [{"name": "skew_kl", "alpha": 1}]}, "less than 1"),
    "alpha 0": ({"divergence": "skew_kl", "alpha": 0}, "greater than 0"),
    "beta 0": ({"terms": [{"name": "jsd", "beta": 0}]}, "greater than 0"),
    "beta 1": ({"divergence": "jsd", "beta": 1}, "less than 1"),
    "both weights zero": ({"soft_weight": 0, "hard_weight": 0}, "nothing would be trained"),
    "negative soft weight": ({"soft_weight": -0.5}, "greater than or equal to 0"),
    "negative hard weight": ({"hard_weight": -0.5}, "greater than or equal to 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_objectives_that_make_no_sense_are_refused(case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        kd.DistillConfig(**settings)
