"""DistillHead: an nn.Linear that can also compute the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.row_kernels.row_pass import LogitTransform
from tests import oracle
from tests.loss_cases import config_of
from tests.oracle import Problem, gradients, make_problem, relative_error


def head_of(problem: Problem) -> nn.Linear:
    vocab, width = problem.weight.shape
    head = nn.Linear(width, vocab, bias=problem.bias is not None, dtype=torch.float64)
    head.weight = nn.Parameter(problem.weight.detach())
    if problem.bias is not None:
        head.bias = nn.Parameter(problem.bias.detach())
    return head


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_the_oracles(bias: bool) -> None:
    problem = make_problem(bias=bias)
    problem.teacher_bias = None
    config = config_of("jsd", temperature=2.0)
    head = kd.DistillHead(head_of(problem), config)
    out = head(problem.hidden, problem.targets, teacher=(problem.teacher_hidden, problem.teacher_weight))
    expected = problem.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    found = gradients(out.loss, [problem.hidden, *head.parameters()])
    for pair in zip(found, gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_without_targets_it_is_the_linear_layer() -> None:
    linear = nn.Linear(5, 11)
    head = kd.DistillHead(linear, config_of())
    hidden = torch.randn(2, 3, 5)
    assert torch.equal(head(hidden), linear(hidden))
    assert isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (5, 11)


def test_it_takes_over_parameters_names_hooks_and_mode() -> None:
    linear = nn.Linear(5, 11).eval()
    linear.register_buffer("extra", torch.ones(2))
    calls = []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    keys = list(linear.state_dict())
    head = kd.DistillHead(linear, config_of())
    calls.clear()  # of the one call that has seen what the hook does to the logits
    assert head.weight is linear.weight and head.bias is linear.bias
    assert list(head.state_dict()) == keys
    assert not head.training
    head(torch.randn(1, 5))
    assert calls == ["hook"]


def test_num_items_and_token_weights() -> None:
    problem = make_problem()
    weights = torch.linspace(0, 2, 13)
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    head = kd.DistillHead(head_of(problem), config_of())
    out = head(problem.hidden, problem.targets, teacher=teacher, num_items=5, token_weights=weights)
    wanted = problem.expected(config_of(), num_items=5, token_weights=weights)
    assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)


def test_scale_softcap_and_added_bias_reach_the_loss() -> None:
    problem = make_problem()
    extra = torch.randn(11, dtype=torch.float64)
    config = config_of("reverse_kl", temperature=2.0)
    teacher = HeadTeacher(
        problem.teacher_hidden, problem.teacher_weight, transform=LogitTransform(scale=0.5, softcap=3.0)
    )

    def expected(student: Tensor) -> oracle.Expected:
        raw = problem.teacher_hidden @ problem.teacher_weight.T
        return oracle.distill_logits(student, 3 * torch.tanh(raw / 6), problem.targets, config)

    capped = kd.DistillHead(head_of(problem), config, transform=LogitTransform(scale=2.0, softcap=4.0))
    out = capped(problem.hidden, problem.targets, teacher=teacher)
    wanted = expected(4 * torch.tanh(problem.hidden @ problem.weight.T / 2))
    assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    found = gradients(out.loss, [problem.hidden, capped.weight])
    for pair in zip(found, gradients(wanted.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12

    shifted = kd.DistillHead(head_of(problem), config, logits_bias=extra)
    out = shifted(problem.hidden, problem.targets, teacher=teacher)
    assert "logits_bias" not in "".join(shifted.state_dict())
    wanted = expected(problem.hidden @ problem.weight.T + extra)
    assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)


def test_rows_counted_on_the_host_give_the_same_sums() -> None:
    problem = make_problem()
    head = kd.DistillHead(head_of(problem), config_of())
    teacher = HeadTeacher(problem.teacher_hidden, problem.teacher_weight)
    rows = (problem.targets != -100).nonzero().squeeze(1)
    calls = [HeadCall(teacher, problem.targets), HeadCall(teacher, problem.targets, rows)]
    sums = [head(problem.hidden, call) for call in calls]
    assert sums[0].shape == () and sums[0].item() == sums[1].item()
    assert calls[0].sums.num_valid.item() == calls[1].sums.num_valid.item() == 9
    expected = problem.expected(config_of())
    assert sums[0].item() == pytest.approx(9 * expected.loss.item(), rel=1e-12)


def test_a_head_whose_forward_was_replaced_is_refused() -> None:
    """The replacement would be taken over with everything else, and the loss never run."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    linear = add_hook_to_module(nn.Linear(5, 11), AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match=r"forward of lm_head has been replaced.*remove_hook_from_module"):
        kd.DistillHead(linear, config_of())
    problem = make_problem()
    linear = remove_hook_from_module(add_hook_to_module(head_of(problem), AlignDevicesHook()))
    head = kd.DistillHead(linear, config_of())
    out = head(problem.hidden, problem.targets, teacher=(problem.teacher_hidden, problem.teacher_weight))
    assert out.loss.item() == pytest.approx(problem.expected(config_of()).loss.item(), rel=1e-12)


def test_bad_input_is_refused() -> None:
    problem = make_problem()
    head = kd.DistillHead(head_of(problem), config_of())
    with pytest.raises(ValueError, match="no teacher given"):
        head(problem.hidden, problem.targets)
    with pytest.raises(ValueError, match="differ in rows"):
        head(problem.hidden, problem.targets, teacher=(problem.teacher_hidden[:3], problem.teacher_weight))
    with pytest.raises(ValueError, match="differ in width"):
        head(problem.hidden, problem.targets, teacher=(problem.teacher_hidden, problem.teacher_weight[:, :2]))
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    with pytest.raises(ValueError, match="do not match the rows"):
        head(problem.hidden, problem.targets[:3], teacher=teacher)
    with pytest.raises(ValueError, match="token_weights"):
        head(problem.hidden, problem.targets, teacher=teacher, token_weights=torch.ones(2))
