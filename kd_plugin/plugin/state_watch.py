"""Notices that a model may do something else to its logits than when that was measured.

Notable decisions:
- what cannot be noticed: a tensor written to through `.data`, which leaves no trace, and what depends on the content,
  the length or the number of the sequences beyond the small batch of the measurement;
- a hook on the whole model that comes after `attach` is never run on logits, as there are none: it is said by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_plugin.distributed.torch_internals import times_written
from kd_plugin.plugin.logit_probe import configurations
from kd_plugin.plugin.replaced_forward import home_of

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch.", "deepspeed.", "accelerate.", "transformers.", "peft.", "kd_plugin.")
_OF_THE_BATCH = re.compile("length|seqlen|seq_len|num_items|batch")
"""Numbers in a call that say how it is cut."""


class StateWatch:
    """What a model may do its logits by: buffers, frozen parameters of the model itself (not of its layers), numbers
    among its attributes, in its configuration and in the call. Trainable parameters are refused by `after_head`.

    Args:
        model: the Hugging Face model, with the hooks that were there when it was measured.
        side: "student" or "teacher", for the warning.
    """

    def __init__(self, model: nn.Module, side: str) -> None:
        self._model, self._side = model, side
        self._buffers = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        config, text = configurations(model)
        owners = {id(owner): owner for owner in (model, config, text) if owner is not None}
        self._namespaces = [vars(owner) for owner in owners.values()]
        self._hooks = set(model._forward_hooks)
        self._seen = self._state({})

    def changed(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it is another than at the last call, in a call with `inputs`; looks at numbers and versions only."""
        before, self._seen = self._seen, self._state(inputs)
        self._look_for_hooks()
        return before != self._seen

    def _state(self, inputs: Mapping[str, Any]) -> tuple[list[tuple[int, int]], list[tuple[str, float]]]:
        tensors = [buffers.get(name) for buffers, name in self._buffers]
        tensors += [p for p in self._model._parameters.values() if p is not None and not p.requires_grad]
        versions = [(id(t), times_written(t)) for t in tensors if t is not None]
        numbers = [(k, v) for space in self._namespaces for k, v in space.items() if type(v) in (int, float)]
        given = [(k, v) for k, v in inputs.items() if type(v) in (int, float) and not _OF_THE_BATCH.search(k)]
        return versions, numbers + given

    def _look_for_hooks(self) -> None:
        hooks = self._model._forward_hooks
        if hooks.keys() == self._hooks:
            return
        for key, hook in hooks.items():
            if key not in self._hooks and not (home := home_of(hook)).startswith(_LIBRARIES):
                logger.warning(
                    "a forward hook on the whole %s (%s) was put on after attach(): what it does to the logits, which "
                    "do not exist here, is lost; put it on before, where it is judged by what it does",
                    *(self._side, home),
                )
        self._hooks = set(hooks)
