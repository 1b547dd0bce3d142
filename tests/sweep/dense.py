"""The independent value: what the models' own logits and own loss say, densely. Nothing of kd_plugin is used here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


class Rows(NamedTuple):
    """Logits with the label of each."""

    logits: Tensor  # [n, V]
    targets: Tensor  # [n]


def shifted(logits: Tensor, labels: Tensor) -> Rows:
    """The label of a position belongs to the logits of the position before. `[B, S, V]`, `[B, S]`."""
    return Rows(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def unshifted(logits: Tensor, labels: Tensor) -> Rows:
    """The label of a position belongs to its own logits. `[B, S, V]`, `[B, S]`."""
    return Rows(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


CONVENTIONS: dict[str, Callable[[Tensor, Tensor], Rows]] = {"shifted": shifted, "unshifted": unshifted}


def cross_entropy(rows: Rows) -> Tensor:
    """Mean over the valid rows."""
    return F.cross_entropy(rows.logits.float(), rows.targets, ignore_index=IGNORE)


def forward_kl(student: Rows, teacher: Rows, temperature: float) -> Tensor:
    """Mean over the valid rows of KL(teacher || student) at `temperature`, times its square."""
    valid = student.targets != IGNORE
    log_q = F.log_softmax(student.logits[valid].double() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.logits[valid].double() / temperature, dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a masked token: 0 log 0 = 0
    return temperature**2 * terms.sum(-1).mean()


def run(model: nn.Module, batch: dict[str, Any]) -> Any:
    """The model's own output; its random numbers, if it draws any, are the same in each call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return model(**batch)
