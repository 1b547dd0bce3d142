# pyright: strict
"""Settings of LoRA adapters; nothing here imports torch or peft."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

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
