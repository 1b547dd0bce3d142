"""The small batch on which a model is probed: its tokens, and the known logits that stand in for its head's.

Notable decisions:
- the same known rows stand in several places of the batch: what depends on the place, or on the hidden states, is
  noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin.causal_lm import accepts
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX, OwnLoss
from kd_plugin.plugin.logit_probe import NUM_ROWS, after_head, changed_by_place, known_rows, other_size
from kd_plugin.plugin.token_ids import embedded_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH = 2, 2 * NUM_ROWS
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def reason_of(error: Exception) -> str:
    """Kind and first line of an error, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def whole_call(model: nn.Module) -> Callable[..., Any]:
    """A call of `model` with all its hooks, under the signature of its forward."""

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return forward


def _usable(model: nn.Module, vocab_size: int) -> int:
    """Token ids that can be both input and label."""
    return min(vocab_size, embedded_ids(model) or vocab_size)


def plain_tokens(model: PreTrainedModel, vocab_size: int) -> Tensor:
    """Token ids `[2, 8]`, none of them special where there are enough others."""
    usable = _usable(model, vocab_size)
    special: set[int] = set()
    for name, value in vars(model.config.get_text_config()).items():
        if name.endswith(("_token_id", "_token_ids")):
            special.update(value if isinstance(value, (list, tuple)) else [value])
    plain = [index for index in range(min(usable, 1000)) if index not in special] or [0]
    count = BATCH * LENGTH
    chosen = [plain[(7 * index) % len(plain)] for index in range(count)]
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    return torch.tensor(chosen, device=device, dtype=torch.int64).view(BATCH, LENGTH)


def labels_of(tokens: Tensor) -> Tensor:
    """Labels `[2, 8]` of the rows with random logits, other ones than the tokens `[2, 8]` there; -100 elsewhere."""
    labels = tokens.flip(0, 1).clone()
    labels[0, : NUM_ROWS + 1] = labels[1, NUM_ROWS:] = OWN_IGNORE_INDEX
    return labels


def special_tokens(model: PreTrainedModel, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with start, end and padding tokens in it, the last ones masked, and labels likewise `[2, 8]`."""
    tokens = plain_tokens(model, vocab_size)
    labels = labels_of(tokens)
    usable = _usable(model, vocab_size)
    pad, bos, eos = (_special_id(model, name, usable) for name in _SPECIAL)
    for ids, row, column, value in (
        *((tokens, 0, -1, pad), (tokens, 0, -2, pad), (tokens, 1, -1, pad), (tokens, 1, 0, bos)),
        *((tokens, 1, -3, eos), (labels, 0, -3, eos), (labels, 1, 1, pad), (labels, 1, 2, eos)),
        (labels, 1, 3, bos),
    ):
        if value is not None:
            ids[row, column] = value
    inputs = {"input_ids": tokens}
    if accepts(model.forward, "attention_mask"):
        inputs["attention_mask"] = mask = torch.ones_like(tokens)
        mask[0, -2:] = mask[1, -1:] = 0
    return inputs, labels


def _special_id(model: PreTrainedModel, name: str, usable: int) -> int | None:
    """The id by this name, if the model has one below `usable`."""
    for config in (model.config.get_text_config(), model.config):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list | tuple) and token else token
        if isinstance(token, int) and 0 <= token < usable:
            return token
    return None


class KnownLogits:
    """Known logits `[2, 8, V]`: the rows of `known_rows` first in one sequence and backwards last in the other,
    random ones beside them, with which the labels go."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        size = (BATCH, LENGTH, vocab_size)
        self.logits = 3 * torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        self.logits[0, :NUM_ROWS] = known_rows(vocab_size)
        self.logits[1, NUM_ROWS:] = known_rows(vocab_size).flip(0)

    def reply(self, hidden_states: Tensor) -> Tensor:
        """These logits, for any hidden states of the batch."""
        if hidden_states.shape[:-1].numel() != BATCH * LENGTH:
            raise ValueError(f"the head is given {tuple(hidden_states.shape)} for {BATCH} x {LENGTH} tokens")
        return self.logits.to(hidden_states.device).reshape(*hidden_states.shape[:-1], -1).clone()


def own_loss_of(output: Any, labels: Tensor) -> OwnLoss | None:
    """The loss in a model's output; None if it has none."""
    loss = getattr(output, "loss", None)
    return OwnLoss(loss.detach(), output.logits.detach(), labels) if isinstance(loss, Tensor) else None


def consistent(logits: Tensor, vocab_size: int, model: nn.Module, side: str) -> AfterHead:
    """What was done to the known rows, the same wherever they stood and without anything trainable in it."""
    if logits.shape[-1] != vocab_size:
        raise other_size(model, side, vocab_size, logits.shape[-1])
    seen = logits.reshape(BATCH, LENGTH, vocab_size)
    first, second = seen[0, :NUM_ROWS], seen[1, NUM_ROWS:].flip(0)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise changed_by_place(model, side)
    return after_head(first, model, side)
