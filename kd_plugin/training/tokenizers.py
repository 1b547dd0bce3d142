"""The tokenizer of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_plugin.models.loading import load_tokenizer
from kd_plugin.plugin.tokenizers import check_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_plugin.settings.run import RunConfig

__all__ = ["tokenizer_of"]


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the data of a run is read with: the student's, or the teacher's if it has none.

    Raises:
        ValueError: it cannot be loaded, or the teacher's gives another meaning to a token id.
    """
    tokenizer = load_tokenizer(config.teacher)
    pretrained = config.student.model and config.student.from_config is None
    if config.student.tokenizer or pretrained:
        teacher_tokenizer, tokenizer = tokenizer, load_tokenizer(config.student)
        check_tokenizers(tokenizer, teacher_tokenizer)
    return tokenizer
