"""What the tests of LoRA students train: adapters on tiny models, and the dense truth in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.ranks import exchange_cases

# name -> settings of the first adapter
ADAPTERS: dict[str, dict[str, Any]] = {
    "inside": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "only_head": {"target_modules": ["lm_head"], "use_rslora": True},
    "two": {"target_modules": ["v_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@dataclass(frozen=True)
class Case(exchange_cases.Case):
    """One training of a student with adapters."""

    adapter: str = "head"
    """A name of `ADAPTERS`; two: a second adapter on the head beside it, both at work."""

    @property
    def name(self) -> str:
        return f"{self.adapter}-{super().name}"


def make_models(case: Case) -> tuple[nn.Module, nn.Module]:
    """(student with adapters, teacher). The adapters have random weights: a zero lora_B would hide the others."""
    student, teacher = exchange_cases.make_models(case)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **ADAPTERS[case.adapter])
    student = peft.get_peft_model(student, config)
    if case.adapter == "two":
        student.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
        student.base_model.set_adapter(["default", "second"])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return student, teacher


def train_densely(case: Case) -> dict[str, Tensor]:
    """The truth for `case`, on whole logits of peft's own head."""
    return exchange_cases.train_densely(case, make_models(case))
