"""Notices a student that is trained past the plugin's loss, whoever took the loss away.

Trainers wrap, replace or bypass a model's forward (TRL's fused head, Liger's patched forwards), or keep the labels for
a loss of their own (label smoothing). Training then goes on, and nothing is distilled. So it is judged by effect, in
hooks that run around whatever the forward has become: did our loss run in this call?

Notable decisions:
- a call with labels and gradients that ends without our loss is an error: nothing else can have been meant;
- one without labels is legal (generation, scoring, reinforcement learning): it is said once, with the likely cause.
  Where that cause is a Hugging Face Trainer that takes the labels away for a loss of its own, it is an error too;
- a backbone that is called alone, past the model's forward, counts as a call without labels;
- a copy of an attached student is a plain model, which may be what was wanted (a control): training it is said once.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.plugin.trainers import refuse_predictions, trainer_causes

logger = logging.getLogger(__name__)

_LABELS = ("labels", "shift_labels")
_CURE = (
    "attach() after whatever replaces the forward (TRL's SFTTrainer does so when it is made, use_liger_kernel when "
    "training starts), and let the trainer take the loss that the model returns: with TRL, by "
    "kd_plugin.hf.DistillTrainerMixin, or `class DistillSFTTrainer(SFTTrainer): compute_loss = "
    "transformers.Trainer.compute_loss`; or plugin.detach()"
)


class BypassError(ValueError):
    """The student is trained, and the distillation loss is not asked for."""


class LossWatch:
    """Hooks on a student that compare what its forward was asked for with what ran.

    Args:
        model: the outermost Hugging Face (or peft) model.
        head_parent: the module that holds the head; the models between the two can be called, too.
    """

    def __init__(self, model: nn.Module, head_parent: nn.Module) -> None:
        self.losses = 0
        """Calls in which the loss ran."""
        self.calls = 0
        """All calls."""
        self._inside = False
        self._calls_measured = 0
        self._said: set[str] = set()
        self._expected_backbone = False
        self._handles: list[RemovableHandle] = []
        models = _models_around(model, head_parent)
        for watched in models:
            hook = _Hook(self, inspect.signature(type(watched).forward))
            self._handles.append(watched.register_forward_pre_hook(hook.before, with_kwargs=True))
            self._handles.append(watched.register_forward_hook(hook.after, with_kwargs=True))
        backbone = getattr(models[-1], "base_model", None)
        if isinstance(backbone, nn.Module) and backbone not in models:
            self._handles.append(backbone.register_forward_hook(_BackboneHook(self)))

    def remove(self) -> None:
        """Watch no longer."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def our_forward(self) -> Iterator[None]:
        """Mark what runs in the body as the plugin's own use of the model, labelled or not."""
        outer, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outer

    def loss_ran(self) -> None:
        """The plugin has computed its loss in this call.

        Raises:
            LogitsWanted: a Hugging Face Trainer makes this call for its logits, as `predict` does.
        """
        self.losses += 1
        if not torch.is_grad_enabled():
            refuse_predictions(sys._getframe())

    def measured(self) -> None:
        """The measurements have been asked for, and there were some."""
        self._calls_measured = self.calls

    def nothing_measured(self) -> None:
        """The measurements have been asked for, and are about no token: say so, if that was to be expected of none."""
        if self.losses and self.calls == self._calls_measured:  # asked twice
            return
        self._calls_measured = self.calls
        logger.warning(
            "metrics(): nothing distilled since the last call, no valid token. The student was called %d times "
            "since attach(), and its loss ran in %d of them: pass labels, not all of them ignore_index",
            *(self.calls, self.losses),
        )

    # -- called by the hooks ----------------------------------------------------------------------------------

    def entered(self) -> int:
        """A call of the student begins -> what `left` wants to know of it."""
        self._expected_backbone = True
        self.calls += 1
        return self.losses

    def left(self, losses_before: int, model: nn.Module, labelled: bool, output: object) -> None:
        """A call of the student has ended."""
        self._expected_backbone = False
        if self._inside or self.losses != losses_before:
            return
        if labelled and _requires_grad(output):
            raise BypassError(
                f"{type(model).__name__} was called with labels, and its forward ended without the distillation loss: "
                f"{_describe(model)}. Nothing would be distilled: {_CURE}"
            )
        if labelled:
            what = f"a call of {type(model).__name__} with labels went past the distillation loss"
            self._say("labels", f"{what}: {_CURE}")
        elif _requires_grad(output):  # whatever the mode: from_pretrained hands models out in eval()
            self._without_labels(f"{type(model).__name__} is trained on a forward without labels")

    def backbone_called(self, backbone: nn.Module, output: object) -> None:
        """The backbone has run, perhaps past the student's forward."""
        expected, self._expected_backbone = self._expected_backbone, False
        if not (expected or self._inside) and _requires_grad(output):
            self._without_labels(f"{type(backbone).__name__} is called past the student's forward")

    def _without_labels(self, what: str) -> None:
        causes = trainer_causes(sys._getframe())
        if causes.refused:
            raise BypassError(f"{what}, so nothing would be distilled: {causes.refused}")
        self._say(
            "without labels",
            f"{what}, so nothing is distilled there. That is as it should be for generation, scoring and reinforcement "
            f"learning; otherwise {causes.likely}",
        )

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s", message)


class _Hook:
    """The hooks of one watched module; those of a copy know no watch."""

    def __init__(self, watch: LossWatch | None, signature: inspect.Signature) -> None:
        self._watch, self._signature = watch, signature
        self._losses = 0
        self._said = False

    @uncompiled
    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._watch is not None:
            self._losses = self._watch.entered()

    @uncompiled
    def after(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        labelled = self._labelled(module, args, kwargs)
        if self._watch is not None:
            self._watch.left(self._losses, module, labelled, output)
        elif labelled and not self._said and _requires_grad(output):
            self._said = True
            logger.warning(
                "this %s is a copy of a student with a teacher attached: it is trained on its own loss, without the "
                "teacher. If that is not what is wanted: plugin.detach(), copy, and attach() to the copy",
                type(module).__name__,
            )

    def _labelled(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        if any(kwargs.get(name) is not None for name in _LABELS):
            return True
        named = self._signature.bind_partial(module, *args).arguments if args else {}
        return any(named.get(name) is not None for name in _LABELS)

    def __deepcopy__(self, memo: dict[int, object]) -> _Hook:
        return _Hook(None, self._signature)

    def __reduce__(self) -> NoReturn:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


class _BackboneHook:
    """The hook of the backbone; that of a copy knows no watch."""

    def __init__(self, watch: LossWatch | None) -> None:
        self._watch = watch

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if self._watch is not None:
            self._watch.backbone_called(module, output)

    def __deepcopy__(self, memo: dict[int, object]) -> _BackboneHook:
        return _BackboneHook(None)

    def __reduce__(self) -> NoReturn:
        raise ValueError("a model with a teacher attached cannot be pickled: save its state_dict(), or detach() first")


def _models_around(model: nn.Module, head_parent: nn.Module) -> list[nn.Module]:
    """The models from the outermost to the innermost that have the head and can be called with labels."""
    around = [model]
    for module in model.modules():
        holds = any(part is head_parent for part in module.modules())
        if module is not model and holds and hasattr(module, "get_output_embeddings") and hasattr(module, "config"):
            around.append(module)
    return around


def _requires_grad(output: object) -> bool:
    """Whether gradients can come back from any tensor of an output."""
    if isinstance(output, Tensor):
        return output.requires_grad
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _describe(model: nn.Module) -> str:
    forward: Any = model.__dict__.get("forward", type(model).forward)
    forward = getattr(forward, "__func__", forward)
    name = getattr(getattr(forward, "__code__", None), "co_qualname", None) or getattr(forward, "__qualname__", "")
    globals_: dict[str, Any] = getattr(forward, "__globals__", {})
    home = globals_.get("__name__") or getattr(forward, "__module__", "") or type(forward).__module__
    return f"the forward that ran is {home}.{name or type(forward).__qualname__}"
