"""The optimizers behind `train.optimizer`, and what their states allow.

Notable decisions:
- `adamw_8bit` is torchao's: it runs on every device, and its states follow FSDP2's shards;
- it has one graph compiled for each shape of a parameter. Where there is no compiler it runs eager, which is said;
- what it keeps in 8 bits depends on a rank's shard, so as many ranks as have written its states read them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from kd_plugin.row_kernels.dispatch import missing_compiler
from kd_plugin.settings.extras import require
from kd_plugin.settings.run import TrainConfig

__all__ = ["EIGHT_BIT", "make_adamw", "set_learning_rate", "states_differ"]

logger = logging.getLogger(__name__)

EIGHT_BIT = "adamw_8bit"
"""The name of the optimizer with 8-bit states."""


def make_adamw(
    groups: list[dict[str, Any]], train: TrainConfig, device: torch.device, *, fused: bool
) -> torch.optim.Optimizer:
    """Make the AdamW of `train` for parameter groups that lie on `device`, sharded already.

    Args:
        groups: as `protocol.parameter_groups` makes them.
        train: its rate, decay rates and kind.
        device: where the parameters are, which says what torch.compile needs.
        fused: update all parameters in one kernel; of no meaning to `adamw_8bit`.

    Raises:
        ImportError: `adamw_8bit` without torchao; the message has the pip command that brings it.
    """
    settings: dict[str, Any] = {"lr": train.learning_rate, "betas": train.adam_betas, "eps": train.adam_eps}
    if train.optimizer != EIGHT_BIT:
        return torch.optim.AdamW(groups, **settings, fused=fused)
    require("torchao", f"train.optimizer {EIGHT_BIT} needs it")
    from torchao.optim import AdamW8bit

    if missing := missing_compiler(device.type):
        logger.warning("train.optimizer %s runs eager, and slowly: %s", EIGHT_BIT, missing)
        return _eager(AdamW8bit)(groups, **settings)
    logger.info("train.optimizer %s: the first step compiles a graph for each shape of a parameter", EIGHT_BIT)
    return AdamW8bit(groups, **settings)


def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind`, whose step calls torch.compile, with a step that leaves it out."""

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return kind.step(self, closure)

    return type(f"Eager{kind.__name__}", (kind,), {"step": step})


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups the learning rate `rate`, in place where it is a tensor, which torchao reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def states_differ(before: tuple[str, int], now: tuple[str, int]) -> str:
    """Why states that one run has written are none for another; empty where they are.

    Args:
        before: `train.optimizer` and the number of ranks of the run that wrote them.
        now: of the run that is to read them.
    """
    if EIGHT_BIT not in (before[0], now[0]) or before == now:
        return ""
    if before[0] != now[0]:
        return f"was written with train.optimizer {before[0]}, this run has {now[0]}, whose states are others"
    return f"was written by {before[1]} ranks, now there are {now[1]}: train.optimizer {EIGHT_BIT} wants as many"
