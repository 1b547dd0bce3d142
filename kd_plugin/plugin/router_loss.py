"""What a model adds to its loss by itself: the router losses of mixtures of experts.

Notable decisions:
- it is read off the model's own `loss`. In the head's place something answers with known logits, whose cross-entropy
  is known too, and the rest is what the model adds, under whatever name and with whatever coefficient it does so
  (JetMoE's `aux_loss_coef`, DBRX's `moe_loss_weight`, Switch's z-loss, the encoder's and the decoder's of NLLB);
- it weighs as if it were the loss of each valid token of its forward. So the weights of one step add up to 1 however
  it is split into micro-batches and ranks, and the step has its forwards' mean router loss by valid token;
- any other loss that a model would add is refused by name: kd_plugin would leave it out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.loss.output import LossSums
from kd_plugin.loss.teacher import AfterHead
from kd_plugin.plugin import causal_lm
from kd_plugin.plugin.labels import OWN_IGNORE_INDEX, own_loss
from kd_plugin.plugin.logit_probe import NUM_ROWS, after_head, known_rows, other_size

__all__ = ["RouterLoss", "refuse_z_loss", "with_router_loss"]

logger = logging.getLogger(__name__)

_CERTAIN = 3e4  # a logit beyond any scale that follows the head, and finite in fp16
_CERTAIN_ROWS = 2
_LABELS = re.compile(r"(^|_)labels?(_|$)|^return_loss$")
_OF_LABELS = re.compile("label|target|batch_size")
_FLAG = "output_router_logits"


class RouterLoss:
    """Runs a student's backbone, and finds what the student adds to its loss besides the cross-entropy.

    Args:
        config: the student's Transformers configuration.
        vocab_size: token ids of the student's head.
        shift: whether the student's own loss shifts its labels.
        always: whether the student is known to add something without being asked to.
    """

    def __init__(self, config: object, *, vocab_size: int, shift: bool, always: bool = False) -> None:
        self._config, self._vocab_size, self._shift, self._always = config, vocab_size, shift, always
        self._warned = False

    def run_backbone(
        self,
        slot: causal_lm.HeadSlot,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        *,
        device: torch.device,
        measure: str | None = None,
    ) -> tuple[causal_lm.Backbone, Tensor | None]:
        """The backbone's part of a forward, and the router loss (0-d, weighted by the model) or None.

        Args:
            slot: where the student's head is.
            forward: the student's own forward.
            inputs: what it is called with, without labels.
            device: where the labels are.
            measure: the side's name, to learn from the same run what happens after the head; else None.

        Raises:
            ValueError: the model would add a loss of another kind; as `causal_lm.run_backbone`.
        """
        _refuse_other_losses(inputs, self._config)
        asked = _asked_for(inputs, self._config)
        if not (asked or self._always):
            wanted = None if measure is None else (self._vocab_size, measure)
            backbone = causal_lm.run_backbone(slot, forward, inputs, measure=wanted)
            if not _has_a_loss(backbone.output):
                return backbone, None
            self._always = True  # a model from elsewhere; this once its forward runs again
            measure = None if backbone.after_head is None else measure
        probe = _Addition(self._vocab_size, device)
        hidden_states, output = probe.run(slot, forward, inputs)
        loss = probe.of(output, slot.parent, shift=self._shift)
        if asked and torch.is_grad_enabled() and not loss.requires_grad:
            self._say_nothing_trains(slot.parent)
        after = None if measure is None else probe.after_head(output, slot.parent, measure)
        return causal_lm.Backbone(hidden_states, output, after), loss

    def _say_nothing_trains(self, model: nn.Module) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is set, but %s adds no router loss that trains: Transformers has none for it, or it reads the flag "
                "as an argument of its forward only",
                *(_FLAG, type(model).__name__),
            )


class _Addition:
    """What a model adds to the cross-entropy of its labels: its own loss, less that of logits that are known.

    Two rows are of a certain token, which is their label (a causal model shifts one of the two away); the known rows
    of `logit_probe` follow, without labels.

    Args:
        vocab_size: V.
        device: of the labels.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self.labels = torch.full((1, _CERTAIN_ROWS + NUM_ROWS), OWN_IGNORE_INDEX, dtype=torch.int64, device=device)
        self.labels[:, :_CERTAIN_ROWS] = 0

    def reply(self, hidden_states: Tensor) -> Tensor:
        """The logits `[1, 6, V]` that the stand-in gives for the head's."""
        certain = torch.full((_CERTAIN_ROWS, self._vocab_size), -_CERTAIN, dtype=torch.float32, device="cpu")
        certain[:, 0] = _CERTAIN
        return torch.cat([certain, known_rows(self._vocab_size)])[None].to(hidden_states.device)

    def run(
        self, slot: causal_lm.HeadSlot, forward: Callable[..., Any], inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Hidden states and output of `forward`, given these labels.

        Raises:
            ValueError: the model reads labels in a way that these do not fit.
        """
        try:
            return causal_lm.run_with_stand_in(slot, forward, {**inputs, "labels": self.labels}, self.reply)
        except (ValueError, IndexError) as error:
            if isinstance(error, causal_lm.HeadCallsError) or not _OF_LABELS.search(str(error)):
                raise
            raise ValueError(
                f"{type(slot.parent).__name__} adds a loss of its own to that of its labels, and what it adds cannot "
                f"be read off: with labels {tuple(self.labels.shape)} for as many rows its forward failed "
                f"({type(error).__name__}: {' '.join(str(error).split())}); take that loss out of its forward, and add "
                "it to student(...).loss yourself"
            ) from error

    def of(self, output: object, model: nn.Module, *, shift: bool) -> Tensor:
        """What was added to the cross-entropy (0-d) in the output that the model made of `reply` and `labels`."""
        loss = _loss_of(output, model)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return loss  # of logits that are certain, the cross-entropy is 0 unless a soft-cap makes them less so
        if logits.shape[-1] != self._vocab_size:
            raise other_size(model, "student", self._vocab_size, logits.shape[-1])
        logits = logits.detach().reshape(1, -1, self._vocab_size)
        return loss - own_loss(logits, self.labels.to(logits.device), shift=shift).to(loss)

    def after_head(self, output: object, model: nn.Module, side: str) -> AfterHead:
        """What the model did to the known rows."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise causal_lm.no_logits(model, side)
        return after_head(logits.reshape(-1, self._vocab_size)[_CERTAIN_ROWS:], model, side)


def with_router_loss(loss_sum: Tensor, router_loss: Tensor | None, sums: LossSums) -> Tensor:
    """`loss_sum` (0-d, over the forward's valid tokens) and the router loss as often as there are valid tokens.

    Without one it weighs 0, and stays in the graph so that every rank's backward reaches the same parameters. Where
    there is nothing to attend to either, Transformers' router loss is NaN, which 0 times would not undo: left out.
    """
    if router_loss is None or (sums.num_rows == 0 and not bool(torch.isfinite(router_loss))):
        return loss_sum
    return loss_sum + router_loss.to(loss_sum) * sums.num_rows


def _asked_for(inputs: Mapping[str, object], config: object) -> bool:
    """Whether the forward is to compute router losses: its argument says so, or else a configuration."""
    given = inputs.get(_FLAG)
    return bool(given) if given is not None else any(getattr(part, _FLAG, False) for part in _configurations(config))


def _configurations(config: object) -> list[object]:
    """The model's configuration and those inside it (`text_config`, ...)."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    return [config, *(nested for part in inner if part is not None for nested in _configurations(part))]


def _refuse_other_losses(inputs: Mapping[str, object], config: object) -> None:
    extra = sorted(name for name, value in inputs.items() if value is not None and _LABELS.search(name))
    if extra:
        raise ValueError(
            f"the student got {', '.join(extra)}, for a loss that the model would add to that of its labels and "
            "kd_plugin does not compute: pass labels alone, or add that loss to student(...).loss yourself"
        )
    refuse_z_loss(config)


def refuse_z_loss(config: object) -> None:
    """Refuse a student whose configuration adds a loss of all its logits.

    Raises:
        ValueError: naming the setting.
    """
    coefficient = getattr(config, "z_loss_coefficient", None)
    if coefficient:
        raise ValueError(
            f"the student's configuration says z_loss_coefficient {coefficient:g}, a loss of its whole logits, which "
            "never exist here: set it to 0; distill.z_loss_weight is the same over the valid tokens"
        )


def _has_a_loss(output: object) -> bool:
    """Whether the output of a forward without labels names a loss, as a router loss would be."""
    if not isinstance(output, Mapping):
        return False
    return any("loss" in name and isinstance(value, Tensor) for name, value in output.items())


def _loss_of(output: object, model: nn.Module) -> Tensor:
    """The model's own loss (0-d); first in a tuple, as Transformers has it."""
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"{type(model).__name__} adds a router loss, but its forward gave no loss for labels, of which it could be "
            "read: its coefficient is not known; set output_router_logits=False, or use DistillHead directly"
        )
    return loss.reshape(())
