"""The rows of a chunk on which the ranks of a run agree, where `distill.chunk_size` leaves that to each device."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.collectives import all_gather_object, num_ranks
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.loss.chunk_size import ChunkSize, chunk_size_on
from kd_plugin.settings.run import DistillConfig

logger = logging.getLogger(__name__)


class AgreedChunk:
    """The smallest chunk that any rank would choose, settled by the first step that trains.

    Sums over other chunks have other last bits, so a run keeps its chunk, and continues with it from a checkpoint.

    Args:
        group: the ranks that train together; None: all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._before: int | None = None
        self._settled: int | None = None

    def continue_with(self, rows: int) -> None:
        """Settle on the `rows` of the run that is continued, as far as every rank has room for them."""
        self._before = rows

    def rows(self, config: DistillConfig, sizes: tuple[int, int | None], like: Tensor) -> int:
        """Rows of a chunk by `config`: what is settled, else what this rank would choose for itself.

        `sizes` are the rows of both heads (the teacher's None without one); `like` is on the device, and in the
        precision, of the hidden states.
        """
        if self._settled is not None and config.chunk_size == "auto":
            return self._settled
        return chunk_size_on(config, *sizes, like.device, like.dtype).rows

    def of_step(self, config: DistillConfig, sizes: tuple[int, int | None], like: Tensor) -> int:
        """As `rows`, for a step: the first one with gradients settles them. Collective then where devices decide."""
        if config.chunk_size == "auto" and self._settled is None and torch.is_grad_enabled():
            self._settle(chunk_size_on(config, *sizes, like.device, like.dtype), differs=like.is_cuda)
        return self.rows(config, sizes, like)

    @uncompiled
    def _settle(self, own: ChunkSize, *, differs: bool) -> None:
        if self._before is not None and self._before < own.rows:
            own = ChunkSize(self._before, "the checkpoint")
        everyone = [own]
        if differs and num_ranks(self._group) > 1:
            everyone = all_gather_object(own, self._group, "rows per chunk (once, in the first step)")
        smallest = min(everyone, key=lambda size: size.rows)
        self._settled = smallest.rows
        if dist.is_initialized() and dist.get_rank(self._group) != 0:
            return
        different = len({size.rows for size in everyone}) > 1
        of_rank = f" on rank {everyone.index(smallest)}" * different
        logger.info("distill.chunk_size: auto -> %d rows (by %s%s)", smallest.rows, smallest.reason, of_rank)
        if self._before is not None and smallest.rows < self._before:
            logger.warning(
                "distill.chunk_size: the checkpoint was written with %d rows per chunk, for which there is no room "
                "here: last bits may differ",
                self._before,
            )
