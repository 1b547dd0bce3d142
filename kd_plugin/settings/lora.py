# pyright: strict
"""Settings of LoRA adapters; nothing here imports torch or peft."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from kd_plugin.settings.distill import Section

__all__ = ["LoraConfig"]

Name = Annotated[str, Field(min_length=1)]


class LoraConfig(Section):
    """Adapters of low rank (LoRA, by peft) that are trained instead of the student's own weights."""

    r: PositiveInt = 16
    """Rank of each adapter."""

    lora_alpha: PositiveInt = 32
    """What an adapter adds is multiplied by lora_alpha / r (with `use_rslora`, by lora_alpha / sqrt(r))."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is set to 0 in training."""

    target_modules: Name | Annotated[tuple[Name, ...], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the head), the ends of their names, e.g.
    [q_proj, v_proj], or one regular expression for their whole names."""

    modules_to_save: tuple[Name, ...] = ()
    """Modules that are trained whole beside the adapters, by the ends of their names, e.g. [lm_head]."""

    use_rslora: bool = False
    """Rank-stabilised LoRA: a larger rank does not shrink what the adapters add."""

    @model_validator(mode="after")
    def _is_an_expression(self) -> Self:
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules {self.target_modules!r} is no regular expression ({error}): several layers are a "
                    "list, [q_proj, v_proj]"
                ) from error
        return self
