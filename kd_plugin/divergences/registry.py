# pyright: strict
"""Every divergence by its name."""

from __future__ import annotations

from collections.abc import Callable

from kd_plugin.divergences import logits, probabilities, registered
from kd_plugin.divergences.definition import Divergence
from kd_plugin.settings.distill import BUILT_IN


def _built_in(name: str) -> Callable[[float, float], Divergence]:
    """The function of this name, with the settings that it takes."""
    make = getattr(probabilities, name, None) or getattr(logits, name)

    def with_settings(beta: float, alpha: float) -> Divergence:
        given = {"beta": beta, "alpha": alpha}
        return make(**{option: given[option] for option in BUILT_IN[name].options})

    return with_settings


DIVERGENCES: dict[str, Callable[[float, float], Divergence]] = {name: _built_in(name) for name in BUILT_IN}
"""Name -> definition for the given `beta` (jsd) and `alpha` (skewed divergences)."""


def get(name: str, *, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The definition called `name`. Raises `ValueError` when there is none."""
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta, alpha)


def register_divergence(name: str, function: registered.Elementwise) -> None:
    """Add the divergence `sum_v function(log q, log p)` under `name`, for `DistillConfig(divergence=name)`.

    Args:
        name: an identifier that is not built in; registering it again replaces it.
        function: elementwise, `(log_q [n, V], log_p [n, V]) -> [n, V]`, of torch operations that autograd and
            torch.compile understand. Log-probabilities of masked tokens are -1e5, not -inf. The gradient with
            respect to the student is derived from it.

    Raises:
        ValueError: a built-in name, or a function that is not elementwise or not finite on equal inputs.
    """
    registered.check(name, function)
    definition = registered.from_function(name, function)
    DIVERGENCES[name] = lambda beta, alpha: definition
    registered.remember(name, function)


def formula_table() -> str:
    """Every built-in divergence as a Markdown table: value, gradient, source."""
    lines = ["| name | value per token | gradient with respect to `z_s / temperature` | source |", "|---|---|---|---|"]
    for name in BUILT_IN:
        about = get(name)
        cells = (f"`{text}`".replace("|", "\\|") for text in (name, about.formula, about.gradient_formula))
        lines.append("| " + " | ".join((*cells, about.source)) + " |")
    return "\n".join(lines)
