"""Arguments of `attach`, and of an attached forward, that are not even of the right kind."""

from __future__ import annotations

from torch import Tensor, nn

from kd_plugin.loss import checks
from kd_plugin.plugin import causal_lm
from kd_plugin.plugin.tokenizers import check_tokenizers
from kd_plugin.settings.run import DistillConfig


def of_attach(student: object, teacher: object, config: object, tokenizers: object) -> None:
    """Refuse what `attach` cannot work with, before either model is touched.

    Raises:
        ValueError: of another kind than wanted, a teacher that is missing or trains with the student, or tokenizers
            that differ.
    """
    if isinstance(teacher, DistillConfig):
        raise ValueError("the teacher is missing: attach(student, teacher, config)")
    config = checks.distill_config(config)
    own = _language_model(student, "student")
    if config.soft_weight and teacher is None:
        raise ValueError(f"soft_weight is {config.soft_weight:g} but teacher is None: pass one, or set soft_weight=0")
    if teacher is not None:
        other = _language_model(teacher, "teacher")
        causal_lm.check_apart(causal_lm.unwrap_model(own), causal_lm.unwrap_model(other))
    if tokenizers is not None:
        if not isinstance(tokenizers, tuple | list) or len(tokenizers) != 2:
            raise ValueError(f"tokenizers is a {type(tokenizers).__name__}; wanted a pair, (student's, teacher's)")
        check_tokenizers(*tokenizers)


def _language_model(model: object, side: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the {side} is a {type(model).__name__}; wanted a loaded model, such as "
            "transformers.AutoModelForCausalLM.from_pretrained(...)"
        )
    return model


def labels(given: object) -> Tensor:
    """Labels, which have to be a tensor.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(given, Tensor):
        raise ValueError(f"labels is a {type(given).__name__}; wanted an int64 tensor [B, S], as the model takes them")
    return given
