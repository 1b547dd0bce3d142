"""Signs of life: a progress bar on rank 0 of a terminal, and a line about what takes long."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["bar", "said_if_slow"]

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


def bar(items: Iterable[_Item], *, what: str, unit: str, total: int | None = None, done: int = 0) -> Iterable[_Item]:
    """`items`, with a bar on standard error while they are gone through, where that is rank 0's terminal.

    Args:
        items: what is gone through.
        what: stands before the bar; may be empty.
        unit: what an item is.
        total: how many items there are, if it is known.
        done: how many of `total` are behind already.
    """
    if not sys.stderr.isatty() or (dist.is_initialized() and dist.get_rank()):
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    shown: Any = tqdm(items, desc=what or None, unit=f" {unit}", total=total, initial=done, leave=False)
    return shown


@contextmanager
def said_if_slow(what: str, *, after_s: float = 5.0) -> Iterator[None]:
    """Log `what` once if the body takes longer than `after_s` seconds."""
    timer = threading.Timer(after_s, logger.info, args=("%s", what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
