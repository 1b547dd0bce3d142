"""Which row a label belongs to, and what a decoder reads: as the student's own loss has it.

Notable decisions:
- the convention is learnt from the model, not looked up by its class: given known logits and labels, its own loss
  is the cross-entropy with labels shifted by one (causal language models) or not shifted (masked language models,
  encoder-decoders, most decoders of encoder-decoders), or the model is refused;
- the inputs that an encoder-decoder makes of its labels are learnt likewise: those with which its decoder returns
  the same hidden states. They differ: T5 and BART put a start token in front, mBART wraps the language code around;
- only where no weights are present, the table of conventions that was generated from Transformers' classes is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_IGNORE_INDEX = -100
"""What Hugging Face's own losses skip."""

_METHODS = ("prepare_decoder_input_ids_from_labels", "_shift_right")


class LabelError(ValueError):
    """The loss cannot know which row a label belongs to."""


class Convention(NamedTuple):
    """How a model reads its labels `[B, S]`."""

    shift: bool
    """True: row s predicts labels[s + 1]. False: row s predicts labels[s]."""
    decoder_inputs: str | None = None
    """How an encoder-decoder makes `decoder_input_ids` of labels, a name of `DECODER_INPUTS`; None: not known."""
    masked: bool = False
    """Whether it leaves out the labels of tokens that `attention_mask` hides."""


def own_loss(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    """The mean cross-entropy (fp64) of logits `[B, S, V]` with labels `[B, S]`, of which -100 are skipped."""
    rows = logits[:, :-1] if shift else logits
    targets = labels[:, 1:] if shift else labels
    return F.cross_entropy(rows.flatten(0, 1).double(), targets.flatten(), ignore_index=OWN_IGNORE_INDEX)


class OwnLoss(NamedTuple):
    """A model's own loss of known logits."""

    loss: Tensor  # 0-d
    logits: Tensor  # [B, S, V], as the model returned them
    labels: Tensor  # [B, S]

    def beyond_cross_entropy(self, *, shift: bool) -> Tensor:
        """What there is in the loss besides the cross-entropy, if that shifts the labels so (0-d, fp64)."""
        return self.loss.double() - own_loss(self.logits, self.labels, shift=shift)


def shift_of(first: OwnLoss, second: OwnLoss | None = None) -> bool | None:
    """Whether a model's own loss shifts its labels; None if it is the cross-entropy neither with nor without.

    A model that adds something to the cross-entropy (router losses) adds the same to that of other logits: then
    `second` is wanted.
    """
    half = first.logits.dtype in (torch.bfloat16, torch.float16)
    distances = {}
    for shift in (True, False):
        beyond = first.beyond_cross_entropy(shift=shift)
        beyond = beyond if second is None else beyond - second.beyond_cross_entropy(shift=shift)
        distances[shift] = float(beyond.abs())
    nearest = min(distances, key=lambda shift: distances[shift])
    return nearest if distances[nearest] <= (1e-2 if half else 1e-4) * max(1.0, float(first.loss.abs())) else None


def learn_shift(first: OwnLoss, again: Callable[[], OwnLoss | None]) -> tuple[bool | None, bool]:
    """Whether a model's own loss shifts its labels, as `shift_of` has it, and whether it adds to the cross-entropy.

    `again` gives the loss of other logits, and is asked only where the first is no cross-entropy.
    """
    shift = shift_of(first)
    return (shift, False) if shift is not None else (shift_of(first, again()), True)


def row_targets(
    labels: Tensor, convention: Convention, ignore_index: int, attention_mask: Tensor | None = None
) -> Tensor:
    """The label of each row, `[B, S]`, of labels and (if any) attention mask `[B, S]` as the model takes them.

    Raises:
        LabelError: the model leaves out what the mask hides, and the mask is of another shape than the labels.
    """
    if convention.masked and attention_mask is not None:
        if attention_mask.shape != labels.shape:
            raise LabelError(
                f"the student leaves out the labels that attention_mask hides, but that is "
                f"{tuple(attention_mask.shape)} for labels {tuple(labels.shape)}: pass one of their shape"
            )
        labels = labels.masked_fill(attention_mask == 0, ignore_index)
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if convention.shift else labels


def _start_token(model: PreTrainedModel, labels: Tensor, *, of_text: bool) -> Tensor:
    """The start token in front, as BART and most others do; `of_text`: by the configuration of the text decoder."""
    config = model.config.get_text_config(decoder=True) if of_text else model.config
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        raise LabelError("the configuration has no decoder_start_token_id or no pad_token_id")
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == OWN_IGNORE_INDEX, pad)


def _wrapped(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The last token that is no padding, a language code, in front, as mBART does."""
    pad = model.config.pad_token_id
    if pad is None:
        raise LabelError("the configuration has no pad_token_id")
    known = labels.masked_fill(labels == OWN_IGNORE_INDEX, pad)
    last = (known.ne(pad).sum(1) - 1).clamp_min(0)
    return torch.cat([known.gather(1, last[:, None]), known[:, :-1]], dim=1)


def _by_method(name: str) -> Callable[[PreTrainedModel, Tensor], Tensor]:
    def make(model: PreTrainedModel, labels: Tensor) -> Tensor:
        method = getattr(model, name, None)
        if method is None:
            raise LabelError(f"the model has no {name}")
        return method(labels)

    return make


DECODER_INPUTS: dict[str, Callable[[PreTrainedModel, Tensor], Tensor]] = {
    **{name: _by_method(name) for name in _METHODS},
    "start token": functools.partial(_start_token, of_text=False),
    "start token of the text decoder": functools.partial(_start_token, of_text=True),
    "last token wrapped": _wrapped,
}
"""Ways to make `decoder_input_ids` `[B, S]` of labels `[B, S]`; the model's own methods go first."""


def decoder_input_ids(model: PreTrainedModel, labels: Tensor, convention: Convention, ignore_index: int) -> Tensor:
    """What the decoder reads, `[B, S]`, as the model itself would make it of these labels.

    Raises:
        LabelError: how it does that is not known.
    """
    if convention.decoder_inputs is None:
        raise LabelError(
            f"how {type(model).__name__} makes its decoder's inputs of labels is not known: pass decoder_input_ids "
            "with the labels (transformers.DataCollatorForSeq2Seq(tokenizer, model=student) makes them)"
        )
    own = labels.masked_fill(labels == ignore_index, OWN_IGNORE_INDEX)
    return DECODER_INPUTS[convention.decoder_inputs](model, own)


def check_same_rows(student: Convention | None, teacher: Convention | None) -> None:
    """Refuse models of which one predicts the token after each place and the other the token at it.

    Raises:
        LabelError: where both conventions are known and differ.
    """
    if student is None or teacher is None or student.shift == teacher.shift:
        return
    says = {True: "the token after it", False: "the token at the place itself"}
    raise LabelError(
        f"at each place the student predicts {says[student.shift]} and the teacher {says[teacher.shift]}, so their "
        "rows do not belong together: choose two causal language models, two masked ones, or two encoder-decoders"
    )
