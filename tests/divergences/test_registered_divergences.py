"""Divergences that a user adds: three lines, and everything else works as for the built-in ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import kd_plugin as kd
from kd_plugin.divergences import registry
from kd_plugin.row_kernels import dispatch
from kd_plugin.settings import distill
from tests.loss_cases import check, config_of, run
from tests.oracle import gradients, make_problem, relative_error


def squared_hellinger(log_q: Tensor, log_p: Tensor) -> Tensor:
    return 0.5 * ((log_q / 2).exp() - (log_p / 2).exp()) ** 2


def expected_gradients(problem, config: kd.DistillConfig) -> tuple[float, list[Tensor]]:
    """Hellinger's distance of dense probabilities, by autograd."""
    z = (problem.hidden @ problem.weight.T + problem.bias) / config.temperature
    t = (problem.teacher_hidden @ problem.teacher_weight.T + problem.teacher_bias) / config.temperature
    valid = problem.targets != -100
    distance = 0.5 * (z.softmax(-1).sqrt() - t.softmax(-1).sqrt()).square().sum(-1)
    loss = config.soft_weight * config.temperature**2 * distance[valid].mean()
    return loss.item(), gradients(loss, problem.leaves)


@pytest.mark.parametrize("row_kernel", ["eager", "compile"])
def test_three_lines_give_value_and_gradient(row_kernel: str) -> None:
    kd.register_divergence("hellinger", squared_hellinger)
    problem = make_problem(bias=True)
    for chunk_size in (1, 4, 64):
        config = config_of("hellinger", temperature=2.0, hard_weight=0, chunk_size=chunk_size, row_kernel=row_kernel)
        out = kd.distill_loss(*problem, config=config, **problem.biases)
        value, wanted = expected_gradients(problem, config)
        assert out.loss.item() == pytest.approx(value, rel=1e-12)
        for grad, expected in zip(gradients(out.loss, problem.leaves), wanted, strict=True):
            assert relative_error(grad, expected) < 1e-11


def test_it_is_compiled_like_the_built_in_ones() -> None:
    """One graph whatever the batch, without a break, and the same result as the eager kernel."""
    kd.register_divergence("hellinger", squared_hellinger)
    torch._dynamo.reset()
    dispatch._compiled.cache_clear()
    before, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (13, 1, 8, 2, 7):
            problem = make_problem(rows=rows, ignored=(), dtype=torch.float32, seed=rows)
            outs = [run(problem, config_of("hellinger", row_kernel=kernel)) for kernel in ("compile", "eager")]
            assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-6)
            for pair in zip(*(gradients(out.loss, problem.leaves) for out in outs), strict=True):
                assert relative_error(*pair) < 1e-5
    assert counters["stats"]["unique_graphs"] - before == 1
    assert sum(counters["graph_break"].values()) == breaks


@pytest.mark.parametrize("built_in", ["forward_kl", "reverse_kl", "jsd"])
def test_a_built_in_divergence_written_by_a_user_is_the_same(built_in: str) -> None:
    kd.register_divergence("mine", SAME_AS[built_in])
    problem = make_problem(bias=True)
    ours = run(problem, config_of(built_in, temperature=2.0))
    mine = run(problem, config_of("mine", temperature=2.0))
    assert mine.loss.item() == pytest.approx(ours.loss.item(), rel=1e-12)
    for pair in zip(gradients(mine.loss, problem.leaves), gradients(ours.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11
    reference = kd.reference.distill_loss(*problem, config=config_of("mine", temperature=2.0), **problem.biases)
    assert reference.loss.item() == pytest.approx(ours.loss.item(), rel=1e-12)


def _jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_q + math.log(0.7), log_p + math.log(0.3))
    return 0.3 * log_p.exp() * (log_p - log_m) + 0.7 * log_q.exp() * (log_q - log_m)


SAME_AS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda log_q, log_p: log_p.exp() * (log_p - log_q),
    "reverse_kl": lambda log_q, log_p: log_q.exp() * (log_q - log_p),
    "jsd": _jsd,
}


def test_it_can_be_a_term_and_is_cut_to_the_shared_vocabulary() -> None:
    kd.register_divergence("mine", SAME_AS["forward_kl"])
    terms = [{"name": "mine", "weight": 0.4, "temperature": 3.0}, {"name": "tvd"}]
    same = [{**terms[0], "name": "forward_kl"}, terms[1]]
    problem = make_problem(vocab=11, teacher_vocab=14)
    settings = {"soft_weight": 0.7, "chunk_size": 4, "row_kernel": "eager"}
    out = run(problem, kd.DistillConfig(terms=terms, **settings))
    expected = problem.expected(kd.DistillConfig(terms=same, **settings))
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11


def test_masked_tokens_arrive_as_a_large_negative_number() -> None:
    seen = []

    def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
        seen.append(float(log_p.min()))
        return log_p.exp() * (log_p - log_q)

    kd.register_divergence("mine", forward_kl)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    student.requires_grad_()
    teacher[:, 2] = float("-inf")
    settings = {"soft_weight": 1, "hard_weight": 0}
    found, wanted = (
        kd.distill_logits(student, teacher, config=config_of(name, **settings)) for name in ("mine", "forward_kl")
    )
    assert min(seen) == -1e5
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    assert relative_error(gradients(found.loss, [student])[0], gradients(wanted.loss, [student])[0]) < 1e-11


def test_registering_again_replaces() -> None:
    problem = make_problem()
    for factor in (1, 3):
        kd.register_divergence("mine", lambda log_q, log_p, f=factor: f * log_p.exp() * (log_p - log_q))
        out = run(problem, config_of("mine"))
        wanted = run(problem, config_of("forward_kl"))
        assert out.soft_loss.item() == pytest.approx(factor * wanted.soft_loss.item(), rel=1e-12)


def test_the_readmes_example_passes_its_check() -> None:
    kd.register_divergence("hellinger", squared_hellinger)
    check(make_problem(), config_of("forward_kl"), tolerance=1e-12)  # and leaves the others alone


BAD: dict[str, tuple[str, Callable[..., object], str]] = {
    "built in": ("jsd", squared_hellinger, "'jsd' is built in: register yours under another name"),
    "no identifier": ("my kl", squared_hellinger, "name 'my kl': wanted letters, digits and underscores"),
    "empty name": ("", squared_hellinger, "name '': wanted letters"),
    "summed": ("bad", lambda q, p: squared_hellinger(q, p).sum(-1), r"returned \(3,\).*must be elementwise"),
    "kept dimension": ("bad", lambda q, p: squared_hellinger(q, p).sum(-1, keepdim=True), r"returned \(3, 1\)"),
    "scalar": ("bad", lambda q, p: squared_hellinger(q, p).mean(), r"returned \(\)"),
    "another dtype": (
        "bad",
        lambda q, p: squared_hellinger(q, p).double(),
        r"torch.float64 for inputs .*torch.float32",
    ),
    "no tensor": ("bad", lambda q, p: 0.0, "returned float"),
    "nothing": ("bad", lambda q, p: None, "returned NoneType"),
    "NaN on equal inputs": ("bad", lambda q, p: (q - p) ** 2 / (q - p), "NaN or infinity on equal inputs"),
    "infinite gradient on equal inputs": ("bad", lambda q, p: (q - p).abs().sqrt(), "NaN or infinity on equal inputs"),
    "NaN on unequal inputs": ("bad", lambda q, p: (q - p - 1).log(), "NaN or infinity on unequal inputs"),
    "too few arguments": ("bad", lambda q: q, "function.log_q, log_p."),
    "not a function": ("bad", 3, "function.log_q, log_p."),
    "softmax of a row": ("bad", lambda q, p: q.softmax(-1) * (q - p), "is not elementwise: it gives other values"),
    "constant": ("bad", lambda q, p: p.exp() * p, "does not depend on log_q"),
    "detached": ("bad", lambda q, p: squared_hellinger(q.detach(), p), "does not depend on log_q"),
    "raises": ("bad", lambda q, p: q @ p, "RuntimeError"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_registered(case: str) -> None:
    name, function, message = BAD[case]
    before = set(registry.DIVERGENCES), set(distill.registered_names)
    with pytest.raises(ValueError, match=message) as error:
        kd.register_divergence(name, function)
    assert "\n" not in str(error.value)
    assert (set(registry.DIVERGENCES), set(distill.registered_names)) == before


def test_a_name_that_nobody_registered_is_refused_with_the_known_ones() -> None:
    kd.register_divergence("hellinger", squared_hellinger)
    with pytest.raises(ValueError, match="did you mean 'hellinger'"):
        config_of("helinger")
    with pytest.raises(ValueError, match=r"known: forward_kl, .*uld, hellinger"):
        config_of("zzz")
