"""How Transformers' classes read labels, where no weights are present to see it."""

from __future__ import annotations

CONVENTIONS: dict[str, tuple[bool, str | None]] = {
    "Gemma2ForCausalLM": (True, None),
    "GraniteForCausalLM": (True, None),
    "LlamaForCausalLM": (True, None),
}
"""Class name -> (labels are shifted by one, how decoder inputs are made of them; see `labels.Convention`)."""
