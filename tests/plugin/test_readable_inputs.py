"""What only one of the two models can read is refused before either has run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

import kd_plugin as kd
from tests.tiny_models import make_model

IDS = torch.randint(3, 53, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG = kd.DistillConfig(row_kernel="eager")
ALONE = kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, row_kernel="eager")


def make(kind: str) -> nn.Module:
    """Both of one width, so that nothing else would object."""
    return make_model(kind, width=16, vocab_size=53, dtype=torch.float32).train()


def given(kind: str, name: str) -> dict[str, object]:
    embeddings = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    values = {
        "inputs_embeds": embeddings,
        "decoder_inputs_embeds": embeddings,
        "encoder_outputs": BaseModelOutput(last_hidden_state=embeddings),
        "past_key_values": DynamicCache(),
    }
    ids = {} if name in ("inputs_embeds", "encoder_outputs") else {"input_ids": IDS}
    return {**ids, name: values[name], "labels": IDS}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "inputs_embeds"),
        ("llama", "past_key_values"),
        ("t5", "inputs_embeds"),
        ("t5", "decoder_inputs_embeds"),
        ("t5", "encoder_outputs"),
    ],
)
def test_what_the_teacher_cannot_read_is_refused_before_anything_ran(kind: str, name: str) -> None:
    student, teacher = make(kind), make(kind)
    kd.attach(student, teacher, CONFIG)
    ran: list[nn.Module] = []
    for model in (student, teacher):
        for module in model.modules():
            if module is not model:  # whose call is the one that is refused
                module.register_forward_pre_hook(lambda module, _: ran.append(module))
    with pytest.raises(ValueError, match=f"{name}, which the teacher cannot read"):
        student(**given(kind, name))
    assert not ran


@pytest.mark.parametrize(("kind", "name"), [("llama", "inputs_embeds"), ("t5", "encoder_outputs")])
def test_without_a_teacher_it_is_read(kind: str, name: str) -> None:
    student = make(kind).eval()
    inputs = given(kind, name)
    own = student(**inputs).loss.item()
    kd.attach(student, None, ALONE)
    assert student(**inputs).loss.item() == pytest.approx(own, rel=1e-5)
