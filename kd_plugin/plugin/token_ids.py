"""Token ids that a model has no embedding or no logit for, named before any kernel asserts on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["UnknownTokenError", "check_inputs", "check_labels", "embedded_ids", "input_embeddings", "replaced_ids"]


class UnknownTokenError(ValueError):
    """A token id that one of the models does not know."""


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds the token ids of `model`; None if it does not say."""
    try:
        return cast("PreTrainedModel", model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # as some models with encoders of images answer
        return None


def embedded_ids(model: nn.Module) -> int | None:
    """How many token ids `model` can read; None if it does not say."""
    return getattr(input_embeddings(model), "num_embeddings", None)


def replaced_ids(model: nn.Module) -> list[int]:
    """Ids that stand for images or sounds, which a model replaces before it embeds them."""
    config = getattr(model, "config", None)
    values = vars(config).items() if config is not None else ()
    kinds = ("image", "video", "audio")
    return [value for name, value in values if isinstance(value, int) and name.startswith(kinds) and "token" in name]


@uncompiled
def check_inputs(
    inputs: Mapping[str, object],
    student: nn.Module,
    teacher: nn.Module | None,
    of_teacher: Mapping[str, object] | None = None,
) -> None:
    """Refuse ids in `input_ids` and `decoder_input_ids` that one of the models cannot embed.

    On a CPU always; on a GPU, where looking waits for the device, only if the models embed different numbers of ids:
    with equal ones, an id that is too large is as wrong for the student alone, and its own kernel says so.

    Args:
        inputs: of the forward.
        student: the model, without wrappers.
        teacher: likewise; None where it reads nothing.
        of_teacher: what it reads, where that is not what the student reads.

    Raises:
        UnknownTokenError: naming the first such id and its place.
    """
    if of_teacher is not None and teacher is not None:
        _check_for(of_teacher, {"teacher": teacher})
        teacher = None
    _check_for(inputs, {"student": student} | ({} if teacher is None else {"teacher": teacher}))


def _check_for(inputs: Mapping[str, object], models: Mapping[str, nn.Module]) -> None:
    embedded = {role: size for role, model in models.items() if (size := embedded_ids(model)) is not None}
    sizes = set(embedded.values())
    if not sizes:
        return
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if not isinstance(ids, Tensor) or ids.numel() == 0 or ids.is_meta:
            continue
        if len(sizes) == 1 and not checks.free_to_read(ids):
            continue
        if int(ids.max()) < min(sizes) and int(ids.min()) >= 0:
            continue
        for role, size in embedded.items():  # what is wrong for a model that does not say is so for the other
            _refuse_unknown(name, ids, role, models[role], size)


def _refuse_unknown(name: str, ids: Tensor, role: str, model: nn.Module, size: int) -> None:
    """Raise `UnknownTokenError` for the first of the `ids` that `model`, which embeds `size` of them, cannot read."""
    unknown = (ids >= size) | (ids < 0)
    for known in replaced_ids(model):
        unknown &= ids != known
    if unknown.any():
        place = unknown.nonzero()[0].tolist()
        raise UnknownTokenError(
            f"{name}{place} is {int(ids[tuple(place)])}, but the {role} embeds ids 0 to {size - 1} only: "
            f"leave such tokens out of the text, or resize the {role}'s embeddings before attach()"
        )


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Refuse labels outside the student's vocabulary, on a CPU; on a GPU the loss looks, where it waits anyway.

    Raises:
        UnknownTokenError: naming the first such label and its place.
    """
    if not checks.free_to_read(labels) or labels.dtype != torch.int64 or labels.numel() == 0:
        return
    unknown = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if unknown.any():
        place = unknown.nonzero()[0].tolist()
        raise UnknownTokenError(
            f"labels{place} is {int(labels[tuple(place)])}, but the student's vocabulary is 0 to {vocab_size - 1}: "
            f"wrong tokenizer, or a padding label other than ignore_index ({ignore_index})?"
        )
