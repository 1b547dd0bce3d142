"""Every refusal of the loss: one line that names the culprit, what was found, and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.oracle import Problem, make_problem
from tests.refusals import refused
from tests.tiny_models import make_batch, make_model

LOSSES = {"distill_loss": kd.distill_loss, "reference.distill_loss": kd.reference.distill_loss}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[..., kd.DistillOutput]:
    return LOSSES[request.param]


def changed(**changes: object) -> Problem:
    """A problem with some tensors replaced."""
    return replace(make_problem(), **changes)


def test_hidden_states_and_targets_of_unequal_length(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(targets=torch.zeros(12, dtype=torch.int64))
    refused(lambda: loss(*problem, config=config_of()), "targets (12,)", "rows (13,)", "shift labels")


def test_student_and_teacher_rows_that_differ(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(teacher_hidden=torch.randn(12, 7).double())
    words = ("student_hidden (13, 5)", "teacher_hidden (12, 7)", "differ in rows", "same tokens")
    refused(lambda: loss(*problem, config=config_of()), *words)


@pytest.mark.parametrize(("side", "width"), [("student", 5), ("teacher", 7)])
def test_hidden_states_and_weight_of_unequal_width(
    loss: Callable[..., kd.DistillOutput], side: str, width: int
) -> None:
    name = "weight" if side == "student" else "teacher_weight"
    problem = changed(**{name: torch.randn(11, width + 1).double()})
    words = (f"{side}_hidden (13, {width})", f"{side}_weight (11, {width + 1})", "differ in width", "[vocab, width]")
    refused(lambda: loss(*problem, config=config_of()), *words)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_of_the_wrong_length(loss: Callable[..., kd.DistillOutput], side: str) -> None:
    bias = {f"{side}_bias": torch.zeros(10).double()}
    words = (f"{side}_bias has shape (10,)", "wanted [11]")
    refused(lambda: loss(*make_problem(), config=config_of(), **bias), *words)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tensors_on_different_devices(side: str) -> None:
    name = "hidden" if side == "student" else "teacher_hidden"
    problem = changed(**{name: getattr(make_problem(), name).detach().to("meta")})
    words = (f"{side}_hidden is on meta", f"{side}_weight on cpu", "move one")
    refused(lambda: kd.distill_loss(*problem, config=config_of()), *words)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_weight_whose_values_are_elsewhere(loss: Callable[..., kd.DistillOutput], side: str) -> None:
    name = "weight" if side == "student" else "teacher_weight"
    problem = changed(**{name: getattr(make_problem(), name).detach().to("meta")})
    words = (f"{side}_weight is on the meta device", "its values are elsewhere", "accelerate offload")
    refused(lambda: loss(*problem, config=config_of()), *words)
    head = nn.Linear(5, 11, bias=False, device="meta", dtype=torch.float64)
    teacher = tuple(make_problem())[2:4]
    head = kd.DistillHead(head, config_of())
    refused(
        lambda: head(make_problem().hidden, make_problem().targets, teacher=teacher), "lm_head.weight is on the meta"
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["hidden", "teacher_hidden", "weight", "teacher_weight"])
def test_tensors_that_are_no_floats(loss: Callable[..., kd.DistillOutput], name: str, dtype: torch.dtype) -> None:
    problem = changed(**{name: torch.ones_like(getattr(make_problem(), name), requires_grad=False).to(dtype)})
    argument = name if name.startswith("teacher") else f"student_{name}"
    refused(lambda: loss(*problem, config=config_of()), f"{argument} is {dtype}", "wanted")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_and_the_hidden_states_of_a_head_that_are_no_floats(side: str) -> None:
    bias = {f"{side}_bias": torch.ones(11, dtype=torch.int64)}
    for function in LOSSES.values():
        refused(lambda f=function: f(*make_problem(), config=config_of(), **bias), f"{side}_bias is torch.int64")
    head = kd.DistillHead(nn.Linear(5, 11, bias=False), config_of(soft_weight=0))
    hidden = torch.zeros(13, 5, dtype=torch.int64)
    refused(lambda: head(hidden, make_problem().targets), "hidden_states is torch.int64", "not token ids")
    refused(lambda: kd.ShardedLogits(torch.zeros(4, 5, dtype=torch.int64), widths=[5]), "torch.int64", "in floats")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_that_are_no_floats(side: str) -> None:
    logits = {"student": torch.randn(4, 5), "teacher": torch.randn(4, 5)}
    logits[side] = torch.zeros(4, 5, dtype=torch.int64)
    for function in LOGITS_LOSSES.values():
        call = lambda f=function: f(*logits.values(), config=config_of(hard_weight=0))  # noqa: E731
        refused(call, f"{side}_logits is torch.int64", "wanted")


def test_no_teacher_though_the_soft_loss_wants_one(loss: Callable[..., kd.DistillOutput]) -> None:
    for missing in ("teacher_hidden", "teacher_weight"):
        problem = changed(**{missing: None})
        refused(lambda p=problem: loss(*p, config=config_of()), "soft_weight is 0.7", "no teacher", "soft_weight=0")


def test_no_targets_though_the_hard_loss_wants_them(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(targets=None)
    refused(lambda: loss(*problem, config=config_of()), "hard_weight is 0.4", "targets is None", "hard_weight=0")


def test_targets_that_are_not_int64(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(targets=torch.zeros(13))
    refused(lambda: loss(*problem, config=config_of()), "targets are torch.float32", "torch.int64", "targets.long()")


@pytest.mark.parametrize("target", [-1, 11, 13, 10**6])
@pytest.mark.parametrize("teacher_vocab", [8, 14])
def test_a_target_outside_the_students_vocabulary(target: int, teacher_vocab: int) -> None:
    problem = make_problem(vocab=11, teacher_vocab=teacher_vocab)
    problem.targets[4] = target
    words = (f"target {target} lies outside", "11 tokens that the student has", "wrong tokenizer", "ignore_index")
    logits = torch.randn(13, 11), torch.randn(13, teacher_vocab)
    for config in (config_of(), config_of(hard_weight=0)):
        for loss in LOSSES.values():
            refused(lambda loss=loss, config=config: loss(*problem, config=config), *words)
        for loss in LOGITS_LOSSES.values():
            refused(lambda loss=loss, config=config: loss(*logits, problem.targets, config=config), *words)


def test_an_ignored_row_may_have_any_target() -> None:
    problem = make_problem()
    problem.targets = torch.where(problem.targets == -100, 10**6, problem.targets)
    assert kd.distill_loss(*problem, config=config_of(ignore_index=10**6)).num_valid.item() == 9


def test_token_weights_of_the_wrong_shape(loss: Callable[..., kd.DistillOutput]) -> None:
    def call() -> object:
        return loss(*make_problem(), config=config_of(), token_weights=torch.ones(12))

    refused(call, "token_weights (12,)", "rows (13,)")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_weight_that_zero_3_has_partitioned_away(loss: Callable[..., kd.DistillOutput], side: str) -> None:
    name = "weight" if side == "student" else "teacher_weight"
    problem = changed(**{name: torch.empty(0, dtype=torch.float64)})
    words = (f"{side}_weight has shape (0,)", "ZeRO-3", "attach(student, teacher, config)", "deepspeed.initialize")
    refused(lambda: loss(*problem, config=config_of()), *words)


def test_a_flat_weight_of_fsdp1(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(weight=torch.randn(55).double())
    refused(lambda: loss(*problem, config=config_of()), "student_weight has shape (55,)", "FSDP1", "attach before")


def test_a_quantised_weight(loss: Callable[..., kd.DistillOutput]) -> None:
    problem = changed(teacher_weight=torch.zeros(11, 7, dtype=torch.int8))
    words = ("teacher_weight is torch.int8", "wanted a float weight", "out of quantisation")
    refused(lambda: loss(*problem, config=config_of()), *words)


class TestDistributedTensors:
    @pytest.fixture(autouse=True)
    def process_group(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def sharded(self, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_sharded_weight(self, loss: Callable[..., kd.DistillOutput], side: str) -> None:
        name = "weight" if side == "student" else "teacher_weight"
        problem = changed(**{name: self.sharded(getattr(make_problem(), name))})
        words = (f"{side}_weight is a DTensor", "FSDP2", "attach(student, teacher, config) before fully_shard")
        refused(lambda: loss(*problem, config=config_of()), *words)

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_sharded_hidden_states(self, loss: Callable[..., kd.DistillOutput], side: str) -> None:
        name = "hidden" if side == "student" else "teacher_hidden"
        problem = changed(**{name: self.sharded(getattr(make_problem(), name))})
        refused(lambda: loss(*problem, config=config_of()), f"{side}_hidden is a DTensor", f"{side}_hidden.to_local()")

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_sharded_logits(self, side: str) -> None:
        logits = {"student": torch.randn(4, 5), "teacher": torch.randn(4, 5)}
        logits[side] = distribute_tensor(logits[side], init_device_mesh("cpu", (1,)), [Replicate()])
        config = config_of(hard_weight=0)
        words = (f"{side}_logits is a DTensor", "whole rows")
        refused(lambda: kd.distill_logits(logits["student"], logits["teacher"], config=config), *words)

    def test_a_sharded_head(self) -> None:
        head = nn.Linear(4, 8)
        head.weight = nn.Parameter(self.sharded(head.weight))
        refused(lambda: kd.DistillHead(head, config_of()), "lm_head is sharded already", "before fully_shard")

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_tensor_parallel_head(self, side: str) -> None:
        models = {name: make_model("llama", seed=seed) for seed, name in enumerate(("student", "teacher"))}
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(models[side], init_device_mesh("cpu", (1,)), plan)
        words = (f"the {side}'s head is", "tensor- or expert-parallel", "leave lm_head out", "ShardedLogits")
        refused(lambda: kd.attach(models["student"], models["teacher"], config_of()), *words)

    def test_a_teacher_that_fsdp2_has_sharded_is_no_such_thing(self) -> None:
        student, teacher = make_model("llama", seed=0), make_model("llama", seed=1)
        fully_shard(teacher.requires_grad_(False), mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        kd.attach(student, teacher, config_of(row_kernel="eager"))
        assert student(**make_batch()).loss.isfinite()

    def test_a_weight_still_on_its_way(self, loss: Callable[..., kd.DistillOutput]) -> None:
        problem = changed(weight=AsyncCollectiveTensor(make_problem().weight.detach()))
        refused(lambda: loss(*problem, config=config_of()), "student_weight is an AsyncCollectiveTensor", "attach(")


class TestFullTensors:
    @pytest.fixture(autouse=True)
    def two_ranks(self) -> Iterator[None]:
        """Of which there is one: its collectives return at once."""
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        yield
        dist.destroy_process_group()

    def test_their_gradient_would_stay_here(self, loss: Callable[..., kd.DistillOutput]) -> None:
        weight = distribute_tensor(make_problem().weight.detach(), init_device_mesh("cpu", (2,)), [Replicate()])
        weight.requires_grad_(True)
        problem = changed(weight=weight.full_tensor())
        words = ("student_weight comes from full_tensor()", "grad_placements=[Partial('avg')]", "attach(")
        refused(lambda: loss(*problem, config=config_of()), *words)
        averaged = changed(weight=weight.full_tensor(grad_placements=[Partial("avg")]))
        frozen = changed(weight=weight.detach().full_tensor())
        for problem in (averaged, frozen):
            assert loss(*problem, config=config_of()).loss.isfinite()


LOGITS_LOSSES = {"distill_logits": kd.distill_logits, "reference.distill_logits": kd.reference.distill_logits}


@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_logits_whose_rows_differ(name: str) -> None:
    loss, rows = LOGITS_LOSSES[name], torch.randn(4, 5)
    config = config_of(hard_weight=0)
    words = ("student_logits (4, 5)", "teacher_logits (3, 5)", "differ in rows")
    refused(lambda: loss(rows, torch.randn(3, 5), config=config), *words)
    refused(lambda: loss(rows, None, config=config), "soft_weight is 0.7", "teacher_logits is None", "soft_weight=0")
    refused(lambda: loss(rows, rows, config=config_of()), "hard_weight is 0.4", "targets is None")
    targets = torch.zeros(3, dtype=torch.int64)
    refused(lambda: loss(rows, rows, targets, config=config), "targets (3,)", "rows (4,)")


def test_messages_end_without_a_full_stop_and_start_with_the_culprit() -> None:
    with pytest.raises(ValueError) as caught:
        kd.distill_loss(*changed(targets=None), config=config_of())
    assert re.match(r"hard_weight ", str(caught.value)) and not str(caught.value).endswith(".")
