"""Row kernels in PyTorch, compiled (one graph each) or eager, run over blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_plugin.distributed import compiler_internals
from kd_plugin.distributed.uncompiled import say_eager

# A chunk is passed to the compiled kernel in blocks of rows, given in bytes of both models' logits. On a CPU they
# stay in the last-level cache, so that its five or so sweeps over the vocabulary read memory once (measured on 2
# Zen cores at V = 49152: 1.6x faster). Everywhere they bound what the kernel keeps between its loops: up to three
# more arrays of a block's `[rows, V]`, elsewhere at most 15 % of the default `loss_memory_mb`. Which size is fastest on
# a GPU is not measured.
_BLOCK_BYTES = {"cpu": 8 * 2**20}
_OTHER_BLOCK_BYTES = 48 * 2**20
# A graph is specialised to V, dtype and strides; more than this many per objective means something is wrong.
_MAX_GRAPHS = 64
# On a GPU torch would otherwise time several shapes of a kernel's blocks, on which the last bits of sums depend.
_OPTIONS = {"fullgraph": True, "options": {"deterministic": True}}


def compiled(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`body` by torch.compile, as one graph with a code cache of its own.

    Where this release of torch cannot compile it, that is said once, and `body` runs as it is from then on.
    """
    return _Compiled(body)


class _Compiled:
    """A compiled function that falls back to the plain one."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        self._plain = body
        self._run = compiler_internals.compiled_alone(body, max_graphs=_MAX_GRAPHS, **_OPTIONS)

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        try:
            return self._run(*tensors)
        except compiler_internals.compile_error() as error:  # before anything has run
            self._run = self._plain
            say_eager("row_kernel", error, "set distill.row_kernel to eager")
            return self._plain(*tensors)


def block_rows(vocab_size: int, device_type: str) -> int:
    """Rows that such a kernel takes at a time."""
    return max(2, _BLOCK_BYTES.get(device_type, _OTHER_BLOCK_BYTES) // (8 * max(vocab_size, 1)))


def in_blocks(
    body: Callable[..., Tensor],
    num_rows: int,
    vocab_size: int,
    device_type: str,
    tensors: Sequence[Tensor | None],  # [>= num_rows, ...] each
) -> Tensor:
    """`body(*tensors)` block by block -> its results `[num_rows, K]` together.

    The number of rows is the one dynamic dimension of the graph, so ragged chunks neither recompile nor need
    padding. torch.compile treats a size of 1 as a constant; a single row therefore takes a second, meaningless
    one from the buffer along.
    """
    block = block_rows(vocab_size, device_type)
    results = []
    start = 0
    # The objective's weights and temperatures are constants of the graph, not inputs that could vary.
    with compiler_internals.floats_as_constants():
        while start < num_rows:
            stop = num_rows if num_rows - start <= block + 1 else start + block  # never leaves a single row over
            length = stop - start
            results.append(body(*(_piece(tensor, start, max(length, 2)) for tensor in tensors))[:length])
            start = stop
    return results[0] if len(results) == 1 else torch.cat(results)


def _piece(tensor: Tensor | None, start: int, length: int) -> Tensor | None:
    if tensor is None:
        return None
    piece = tensor[start : start + length]
    if piece.shape[0] < length:  # one row of [num_rows, 1]: repeat it
        piece = piece.expand(length, -1).contiguous()
    compiler_internals.mark_dim_dynamic(piece, 0)
    return piece
