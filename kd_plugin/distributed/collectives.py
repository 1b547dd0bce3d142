# pyright: strict
# pyright: reportDeprecated=false, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Collectives that say which one they were when they fail.

A rank that waits in vain for the others gets from gloo a line about sockets and milliseconds. Here it also learns
what it waited for, where in its own work it was, and what usually causes this. Nothing is formatted before a
failure. Over NCCL a failed collective ends the process without an exception; the counts that all ranks compare
before the first chunk therefore travel over gloo where a group has it (see `host_device`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from kd_plugin.distributed.torch_internals import gather_into, group_devices, reduce_scatter_into

_CAUSE = (
    "Most likely another rank failed (then its own message comes first), ended its epoch early or did not call the "
    "student in this step: run the same number of steps on every rank (drop_last=True), or let a rank without data go "
    "on with a batch whose labels are all ignore_index. Models that FSDP or ZeRO-3 shards are evaluated on every rank"
)


_Value = TypeVar("_Value")

_UNANSWERED = re.compile(r"Timed out waiting|timeout caused pair closure|by peer|Socket Timeout|NCCL")


class CollectiveError(RuntimeError):
    """The other ranks did not answer: which collective of the loss it was, and where this rank was in its work."""

    def __init__(self, reason: str, *where: str) -> None:
        self.reason, self.where = reason, where
        super().__init__(f"{', '.join(where)}: {reason}. {_CAUSE}")


def _failed(error: RuntimeError, what: str) -> CollectiveError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CollectiveError(reason[0].rstrip("."), f"rank {dist.get_rank()} of {dist.get_world_size()}, {what}")


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn a failure of the collective inside into a `CollectiveError` that calls it `what`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _failed(error, what) from error


@contextmanager
def named_in_wrapper(where: str) -> Iterator[None]:
    """Turn a failure of a wrapper's own collective inside into a `CollectiveError` that says `where` that was.

    Such a failure is a plain RuntimeError, told from others by the words of gloo and NCCL.
    """
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _UNANSWERED.search(str(error)):
            raise _failed(error, f"a collective of the student's or the teacher's wrapper {where}") from error
        raise


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Add to the `CollectiveError` of a collective inside where this rank was; called on failure only."""
    try:
        yield
    except CollectiveError as error:
        raise CollectiveError(error.reason, *error.where, where()) from error.__cause__


class _Handle(Protocol):
    """torch's `Work`, which no public module names."""

    def wait(self) -> object: ...


class Pending:
    """A collective under way."""

    def __init__(self, handle: _Handle | None, what: str) -> None:
        assert handle is not None, "this rank is not in the group"
        self._handle, self._what = handle, what

    def wait(self) -> None:
        """Wait until it is done (on the host; on a GPU, until its stream may go on)."""
        with named(self._what):
            self._handle.wait()


@overload
def all_gather(tensor: Tensor, group: dist.ProcessGroup | None, what: str) -> Tensor: ...
@overload
def all_gather(
    tensor: Tensor, group: dist.ProcessGroup | None, what: str, *, wait: Literal[False]
) -> tuple[Tensor, Pending]: ...
def all_gather(
    tensor: Tensor, group: dist.ProcessGroup | None, what: str, *, wait: bool = True
) -> Tensor | tuple[Tensor, Pending]:
    """`[n, ...]` of every rank -> `[W * n, ...]`; with `wait=False` also the `Pending` to wait for."""
    out = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    what = f"all-gather of {what}"
    with named(what):
        handle = gather_into()(out, tensor.contiguous(), group=group, async_op=not wait)
    return out if wait else (out, Pending(handle, what))


@overload
def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup | None, what: str) -> Tensor: ...
@overload
def reduce_scatter(
    tensor: Tensor, group: dist.ProcessGroup | None, what: str, *, wait: Literal[False]
) -> tuple[Tensor, Pending]: ...
def reduce_scatter(
    tensor: Tensor, group: dist.ProcessGroup | None, what: str, *, wait: bool = True
) -> Tensor | tuple[Tensor, Pending]:
    """Sum of `[W * n, ...]` over ranks -> this rank's `[n, ...]`; with `wait=False` also the `Pending`, until which
    `tensor` must stay as it is."""
    out = tensor.new_empty(tensor.shape[0] // dist.get_world_size(group), *tensor.shape[1:])
    what = f"reduce-scatter of {what}"
    with named(what):
        handle = reduce_scatter_into()(out, tensor, group=group, async_op=not wait)
    return out if wait else (out, Pending(handle, what))


def all_reduce(
    tensor: Tensor,
    group: dist.ProcessGroup | None,
    what: str,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> None:
    """Sum over ranks (or `op`), in place."""
    with named(f"all-reduce of {what}"):
        dist.all_reduce(tensor, op=op, group=group)


def all_to_all(
    out: Tensor,
    tensor: Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup | None,
    what: str,
) -> Pending:
    """Piece r of flat `tensor` (`sent[r]` elements) to rank r, its pieces into `out` -> the `Pending` to wait for."""
    what = f"all-to-all of {what}"
    with named(what):
        handle = dist.all_to_all_single(out, tensor, list(received), list(sent), group=group, async_op=True)
    return Pending(handle, what)


def all_gather_object(value: _Value, group: dist.ProcessGroup | None, what: str) -> list[_Value]:
    """The picklable `value` of every rank, in rank order; waits for the device."""
    values = [value] * dist.get_world_size(group)
    with named(f"all-gather of {what}"):
        dist.all_gather_object(values, value, group=group)
    return values


def host_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where numbers of the host are best compared: the CPU if `group` reaches it, else `device`."""
    cpu = torch.device("cpu")
    return cpu if cpu in group_devices(group) else device


_THREADS = Path("/proc/self/task")
_REST_S, _LONGEST_REST_S = 0.002, 5.0


def end_process_groups() -> None:
    """`destroy_process_group()` for all groups, then `wait_for_gloo()`: the last that a process does with its ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    wait_for_gloo()


def wait_for_gloo() -> None:
    """Return when gloo's threads have let go of the tensors of collectives that are over; a few milliseconds.

    A collective returns to its caller before gloo's thread has dropped the tensors, and to drop one that Python has
    seen it needs the interpreter. If that is ending by then, Python 3.13 and older end the thread instead, and C++ ends
    the process: "terminate called without an active exception", exit code -6. `destroy_process_group` joins the threads
    only of groups that nobody refers to, but DTensor's caches keep a mesh of FSDP2 and its groups for good, and
    DeepSpeed keeps its own. So whoever may be the last to act before the process ends, waits for them here.
    """
    limit, asleep = time.monotonic() + _LONGEST_REST_S, 0
    while asleep < 2 and time.monotonic() < limit:  # twice: one that waits for the interpreter sleeps, too, and gets it
        time.sleep(_REST_S)
        asleep = asleep + 1 if _gloo_sleeps() else 0


def _gloo_sleeps() -> bool:
    """Whether none of gloo's threads is running or about to; True where the system does not list threads."""
    states = []
    for thread in _THREADS.glob("*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            name, _, rest = thread.read_text().partition("(")[2].rpartition(")")
            states += [rest.split()[0]] if "gloo" in name else []
    return "R" not in states


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of `group` (default: all); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
