"""fp32 models under autocast, as Hugging Face's Trainer runs them with `bf16=True`: both heads follow it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kd_plugin as kd
from tests.tiny_models import assert_same_gradients, gradients_of, make_batch, make_model

CONFIG = kd.DistillConfig(row_kernel="eager", chunk_size=5, soft_weight=0.7, hard_weight=0.3, temperature=2.0)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    return make_model(name, dtype=torch.float32, seed=1), make_model(name, dtype=torch.float32, seed=2, width=48)


class Rounded(torch.autograd.Function):
    """A head's product whose operands are rounded, in fp64, with gradients of rounded operands."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
        hidden, weight = hidden.bfloat16().double(), weight.bfloat16().double()
        ctx.save_for_backward(hidden, weight)
        ctx.scale = scale
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        gradient = (gradient * ctx.scale).bfloat16().double() / ctx.scale
        return (gradient @ weight).float(), (gradient.flatten(0, 1).T @ hidden.flatten(0, 1)).float(), None


def dense(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], valid: int) -> Tensor:
    """The models' own logits under autocast, their heads' products by `Rounded`, before anything is attached."""
    for model in (student, teacher):
        head = model.get_output_embeddings()
        head.forward = functools.partial(lambda head, hidden: Rounded.apply(hidden, head.weight, valid), head)
    with torch.autocast("cpu", torch.bfloat16):
        logits = [model(input_ids=batch["input_ids"]).logits[:, :-1] for model in (student, teacher)]
    return kd.reference.distill_logits(logits[0], logits[1].detach(), batch["labels"][:, 1:], config=CONFIG).loss


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_an_attached_student_rounds_what_autocast_rounds(name: str) -> None:
    student, teacher = pair(name)
    batch = make_batch()
    valid = int((batch["labels"][:, 1:] != -100).sum())
    models = copy.deepcopy((student, teacher))
    wanted = dense(*models, batch, valid)
    gradients = gradients_of(models[0], lambda: wanted)
    kd.attach(student, teacher, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(**batch).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    found = gradients_of(student, lambda: loss)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    # the layers' own products round to bf16 in backward: a gradient of hidden states 1e-7 off may take another step
    assert_same_gradients(found, gradients, 5e-4)
    if name == "llama":
        head = {"lm_head.weight": found["lm_head.weight"]}
        assert_same_gradients(head, {"lm_head.weight": gradients["lm_head.weight"]}, 1e-5)
    loss = student(**batch).loss
    assert abs(loss.item() - wanted.item()) > 1e-5, "outside of autocast nothing is rounded"


def test_ranks_compare_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank under it and another not would compute two losses, and gather rows of two sizes."""
    from kd_plugin.exchange import mode

    student, teacher = pair("llama")
    kd.attach(student, teacher, CONFIG)
    told: list[dict[str, object]] = []
    monkeypatch.setattr(mode, "num_ranks", lambda group: 2)
    monkeypatch.setattr(mode, "_agree", lambda group, compared, settle: told.append(compared))
    exchange = mode.Exchange(CONFIG, None)
    with torch.autocast("cpu", torch.bfloat16):
        exchange.compare_ranks(student.lm_head)
    mode.Exchange(CONFIG, None).compare_ranks(student.lm_head)
    assert [settings["torch.autocast"] for settings in told] == [{"cpu": torch.bfloat16}, {}]
