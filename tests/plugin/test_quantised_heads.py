"""Heads that the loss cannot take over are refused by name; quantised layers elsewhere are the model's own business."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.refusals import refused
from tests.tiny_models import expected_loss, make_batch, make_model


def test_heads_that_the_loss_cannot_take_over() -> None:
    refused(lambda: kd.DistillHead(nn.Identity(), config_of()), "Identity", "torch.nn.Linear")
    quantised = nn.Linear(4, 8)
    quantised.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    refused(lambda: kd.DistillHead(quantised, config_of()), "Linear with torch.uint8 weights", "out of quantisation")
    other = nn.Linear(4, 8).requires_grad_(False)
    other.weight = nn.Parameter(TwoTensor(other.weight, other.weight), requires_grad=False)
    refused(lambda: kd.DistillHead(other, config_of()), "two_tensor.TwoTensor weights", "modules_to_not_convert")
    partitioned = nn.Linear(4, 8)
    partitioned.weight = nn.Parameter(torch.empty(0))
    partitioned.weight.ds_id = partitioned.ds_id = 0  # the engine numbers modules, zero.Init alone does not
    refused(lambda: kd.DistillHead(partitioned, config_of()), "sharded already", "before", "deepspeed.initialize")


def packed_in_floats(head: nn.Linear) -> None:
    """As bitsandbytes does with `bnb_4bit_quant_storage=torch.bfloat16`."""
    head.weight = nn.Parameter(torch.zeros(head.weight.numel() // 4, 1), requires_grad=False)


def of_float8(head: nn.Linear) -> None:
    head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def of_bitsandbytes(head: nn.Linear) -> None:
    """Still in floats: `Int8Params` become integers when they move to a GPU."""
    kind = type("Int8Params", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    head.weight = kind(head.weight.detach(), requires_grad=False)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("quantise", [packed_in_floats, of_float8, of_bitsandbytes], ids=lambda f: f.__name__)
def test_a_quantised_head_is_refused_by_attach(quantise: Callable[[nn.Linear], None], side: str) -> None:
    models = {name: make_model("llama", seed=seed) for seed, name in enumerate(("student", "teacher"))}
    quantise(models[side].lm_head)
    words = (f"the {side}'s head is a torch.nn.modules.linear.Linear", "out of quantisation", "llm_int8_skip_modules")
    refused(lambda: kd.attach(models["student"], models["teacher"], config_of()), *words)


def test_quantised_layers_of_a_teacher_are_its_own_business() -> None:
    class Int8Linear(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ (self.weight.to(hidden.dtype) / 64).T

    student, teacher = make_model("llama", seed=0), make_model("llama", seed=1)
    layer = teacher.model.layers[0].mlp.down_proj
    layer.__class__ = Int8Linear
    layer.weight = nn.Parameter((64 * layer.weight.detach()).round().to(torch.int8), requires_grad=False)
    expected = expected_loss(student, teacher, make_batch(), config_of()).loss
    kd.attach(student, teacher, config_of())
    found = student(**make_batch()).loss
    torch.testing.assert_close(found, expected.to(found))
