"""Heads that are more than a matrix: judged by what they do, and refused where that is lost or cannot be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.tiny_models import expected_loss, make_batch, make_model


class TokenScaled(nn.Linear):
    """A scale for each token, by its hidden state."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (1 + hidden.mean(-1, keepdim=True).tanh())


class TwoProjections(nn.Linear):
    """A second matrix, added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.other = nn.Linear(self.in_features, self.out_features, bias=False, dtype=self.weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.other(hidden)


class Rounding(nn.Linear):
    """A cast that rounds."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.bfloat16(), self.weight.bfloat16()).to(hidden.dtype)


class Normed(nn.Linear):
    """A norm inside: nothing of it shows at hidden states of unit norm."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden * hidden.square().mean(-1, keepdim=True).add(1e-6).rsqrt())


class Capped(nn.Linear):
    """A cap that only large logits reach."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 30 * (super().forward(hidden) / 30).tanh()


class Stretched(nn.Linear):
    """Three per cent, hardly more than what bfloat16 rounds."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 1.03


class Dropping(nn.Linear):
    """Dropout, which an evaluation does not show."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(hidden, 0.5, self.training))


class Widening(nn.Linear):
    """A cast that changes nothing: logits of half-precision models in fp32, as several models want them."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return nn.functional.linear(hidden.to(wide), self.weight.to(wide))


def with_head(kind: type[nn.Linear], seed: int = 1) -> nn.Module:
    model = make_model("llama", seed=seed)
    plain = model.lm_head
    head = kind(plain.in_features, plain.out_features, bias=False, dtype=plain.weight.dtype)
    head.weight = plain.weight
    model.lm_head = head
    return model


def hooked(register: str, hook: Callable[..., Any], seed: int = 1) -> nn.Module:
    model = make_model("llama", seed=seed)
    getattr(model.lm_head, register)(hook)
    return model


CHANGED = {
    "a forward of its own (tests.plugin.test_plain_head.TokenScaled)": lambda: with_head(TokenScaled),
    "a forward of its own (tests.plugin.test_plain_head.TwoProjections)": lambda: with_head(TwoProjections),
    "a forward of its own (tests.plugin.test_plain_head.Rounding)": lambda: with_head(Rounding),
    "a forward hook (tests.plugin.test_plain_head.": lambda: hooked("register_forward_hook", lambda m, a, out: out * 2),
    "a forward hook (tests.plugin.test_plain_head": lambda: hooked(
        "register_forward_pre_hook", lambda m, a: (a[0] * 2,)
    ),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_changes_its_logits_is_refused(what: str, side: str) -> None:
    models = {"student": make_model("llama"), "teacher": make_model("llama"), side: CHANGED[what]()}
    with pytest.raises(ValueError) as caught:
        kd.attach(models["student"], models["teacher"], config_of())
    assert what in str(caught.value) and "its logits are not hidden @ weight.T + bias" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Normed, Capped, Stretched, Dropping])
def test_a_head_whose_own_way_shows_only_at_some_sizes_or_in_training_is_refused(
    kind: type[nn.Linear], dtype: torch.dtype
) -> None:
    model = with_head(kind).to(dtype).eval()
    with torch.no_grad():
        model.lm_head.weight.div_(10)
    with pytest.raises(ValueError, match="its logits are not hidden @"):
        kd.attach(make_model("llama"), model, config_of())
    assert not model.lm_head.training


def test_a_plain_head_in_half_precision_that_is_watched_passes() -> None:
    model = hooked("register_forward_hook", lambda module, args, output: None).bfloat16()
    kd.attach(make_model("llama"), model, config_of()).detach()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_only_looks_or_widens_passes(side: str) -> None:
    batch, calls = make_batch(), []
    watched = hooked("register_forward_hook", lambda module, args, output: calls.append(1), seed=3)
    for special in (watched, with_head(Widening, seed=3)):
        models = {"student": make_model("llama", seed=1), "teacher": make_model("llama", seed=2), side: special}
        expected = expected_loss(models["student"], models["teacher"], batch, config_of()).loss.item()
        plugin = kd.attach(models["student"], models["teacher"], config_of())
        assert models["student"](**batch).loss.item() == pytest.approx(expected, rel=1e-9)
        plugin.detach()
    assert calls


def test_a_widening_head_still_widens_without_labels() -> None:
    student, batch = with_head(Widening).bfloat16(), make_batch()
    wanted = student(batch["input_ids"]).logits
    assert wanted.dtype == torch.float32
    kd.attach(student, make_model("llama"), config_of())
    found = student(batch["input_ids"]).logits
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_a_head_of_its_own_kind_whose_weight_is_elsewhere_is_refused() -> None:
    model = with_head(Widening)
    model.to("meta")
    with pytest.raises(ValueError, match=r"a forward of its own .*Widening.*its weight is not here"):
        kd.attach(make_model("llama"), model, config_of())


def test_a_parametrized_head_is_refused_with_the_cure() -> None:
    model = make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"parametrized weight.*remove_parametrizations"):
        kd.attach(model, make_model("llama"), config_of())


def test_a_hook_that_comes_after_attach_and_changes_the_loss_is_noticed() -> None:
    student, teacher, batch = make_model("llama"), make_model("llama", seed=2), make_batch()
    kd.attach(student, teacher, config_of())
    handle = student.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="a forward hook on the student's head changed what it returned"):
        student(**batch)
    handle.remove()
    student(**batch)
    handle = teacher.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="a forward hook on the teacher's head changes what it returns"):
        student(**batch)
    handle.remove()
    student.lm_head.register_forward_pre_hook(lambda module, args: (args[0],))
    with pytest.raises(ValueError, match="a forward pre-hook on the student's head has dropped"):
        student(**batch)
