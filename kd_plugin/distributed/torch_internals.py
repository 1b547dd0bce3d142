"""The names of torch that are private, or that only some releases have: each is used here alone.

Notable decisions:
- a name that is missing is said by name, with the release that is installed and the releases that are tested, instead
  of an AttributeError from the middle of a step;
- where kd_plugin can do without a name at no more than some memory, speed or advice, it does, and the function says so;
- a newer or public name goes before an older or private one, so nothing here warns of a deprecation.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.fx.experimental
from torch import Tensor, nn
from torch.distributed import distributed_c10d, fsdp

TESTED_TORCH = ("2.11", "2.14")
"""The first and the last release of torch that the tests run with."""


class UnsupportedTorch(ValueError):
    """The installed release of torch lacks a name that kd_plugin cannot do without."""


def required(owner: object, name: str, path: str) -> Any:
    """`owner.name`, which a user knows as `path`.

    Raises:
        UnsupportedTorch: there is none.
    """
    attribute = getattr(owner, name, None)
    if attribute is None:
        first, last = TESTED_TORCH
        raise UnsupportedTorch(
            f"torch {torch.__version__} is installed and has no {path}, which kd_plugin needs; it is tested with torch "
            f"{first} to {last}: pip install 'torch=={last}.*'"
        )
    return attribute


# -- autograd and tensors -------------------------------------------------------------------------------------------


def graph_is_kept() -> bool:
    """Whether the backward that is running may run again (`retain_graph=True`).

    True where torch does not say: then no saved tensor is overwritten, at the price of a copy.
    """
    query = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


_LIBRARY = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
HALF_KERNEL = _LIBRARY, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
"""Library and symbol of `at::native::cpublas::brgemm` for bf16; with other arguments it would have another symbol."""


@functools.cache
def half_kernel() -> Callable[..., None] | None:
    """The kernel `C[M, N] = A[M, K] @ B[K, N]`, C in fp32, A and B in bf16, as a function of plain numbers.

    Its arguments are M, N, K, the rows' lengths in A, B and C, whether to add to C, three addresses, and whether pairs
    along K stand side by side in B (`[K / 2, N, 2]`). None where torch has no such symbol.
    """
    try:
        kernel = ctypes.CDLL(HALF_KERNEL[0])[HALF_KERNEL[1]]
    except (OSError, AttributeError):
        return None
    kernel.restype = None
    kernel.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    return kernel


def assert_on_device(condition: Tensor, message: str) -> None:
    """Let the device, for which the host does not wait, end the process with `message` unless `condition` (0-d) holds.

    Raises:
        UnsupportedTorch: torch has no such assertion.
    """
    required(torch, "_assert_async", "torch._assert_async")(condition, message)


def is_awaited_collective(tensor: Tensor) -> bool:
    """Whether `tensor` is the result of a functional collective, for which it waits when it is first read.

    False where torch has no such class, and so no such tensor.
    """
    kind = getattr(getattr(dist, "_functional_collectives", None), "AsyncCollectiveTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether `tensor` is of a class that wraps other tensors, as torchao's quantised weights are.

    Raises:
        UnsupportedTorch: torch does not tell them apart.
    """
    from torch.utils import _python_dispatch

    path = "torch.utils._python_dispatch.is_traceable_wrapper_subclass"
    return required(_python_dispatch, "is_traceable_wrapper_subclass", path)(tensor)


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that `tensor` is made of: itself, or what a class that wraps others keeps (codes, scales).

    Raises:
        UnsupportedTorch: torch does not tell the two apart.
    """
    if not is_wrapper_subclass(tensor):
        return [tensor]
    parts = [getattr(tensor, name) for name in cast("Any", tensor).__tensor_flatten__()[0]]
    return [inner for part in parts for inner in inner_tensors(part)]


def storage_id(tensor: Tensor) -> int:
    """A number that tensors share exactly if they share memory, on the meta device too; good while one of them lives.

    Raises:
        UnsupportedTorch: torch does not number storages.
    """
    return required(tensor.untyped_storage(), "_cdata", "torch.UntypedStorage._cdata")


def times_written(tensor: Tensor) -> int:
    """How often `tensor` has been written to in place; 0 for one of inference mode, which does not count that.

    Raises:
        UnsupportedTorch: torch does not count it.
    """
    return 0 if tensor.is_inference() else required(tensor, "_version", "torch.Tensor._version")


def cut_of_gradient(tensor: Tensor) -> tuple[Any, Any] | None:
    """How a copy that was taken out of a DTensor has its gradient put back; None for any other tensor.

    Returns:
        The DTensor's spec (with `mesh` and `placements`), and the placements that were asked for, or None.

    Raises:
        UnsupportedTorch: autograd does not keep the spec.
    """
    node = tensor.grad_fn
    if node is None or node.name() != "_ToTorchTensorBackward":
        return None
    spec = required(node, "dtensor_spec", "dtensor_spec on the gradient of DTensor.full_tensor()")
    return spec, getattr(node, "grad_placements", None)


def watch_operations(see: Callable[[Any, Any, Any], None]) -> AbstractContextManager[object]:
    """Have `see(operation, arguments, result)` called for each operation of the body, views aside, backward's too.

    Raises:
        UnsupportedTorch: torch does not dispatch through Python.
    """
    from torch.utils import _python_dispatch

    base: Any = required(_python_dispatch, "TorchDispatchMode", "torch.utils._python_dispatch.TorchDispatchMode")

    def dispatch(_mode: Any, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        if all(alias is None or alias.is_write for alias in aliases):
            see(func.overloadpacket, (args, kwargs or {}), out)
        return out

    return type("Watch", (base,), {"__torch_dispatch__": dispatch})()


# -- calls of modules -----------------------------------------------------------------------------------------------


def whole_call(module: nn.Module) -> Callable[..., Any] | None:
    """The call of `module` as its class has it, hooks and forward; None where torch has no such name for it."""
    call = getattr(type(module), "_call_impl", None)
    return None if call is None else MethodType(call, module)


def replace_whole_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let `call` run for `module(...)`; nothing changes where torch looks for no such attribute of the instance."""
    if whole_call(module) is not None:
        module.__dict__["_call_impl"] = call


def restore_whole_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Take `call` out again, if it is still what `replace_whole_call` put there."""
    if module.__dict__.get("_call_impl") is call:
        del module.__dict__["_call_impl"]


# -- process groups and collectives ---------------------------------------------------------------------------------


def gather_into() -> Callable[..., Any]:
    """`torch.distributed.all_gather_single`, called `all_gather_into_tensor` before torch 2.13."""
    return getattr(dist, "all_gather_single", None) or required(
        dist, "all_gather_into_tensor", "torch.distributed.all_gather_single"
    )


def reduce_scatter_into() -> Callable[..., Any]:
    """`torch.distributed.reduce_scatter_single`, called `reduce_scatter_tensor` before torch 2.13."""
    return getattr(dist, "reduce_scatter_single", None) or required(
        dist, "reduce_scatter_tensor", "torch.distributed.reduce_scatter_single"
    )


def group_devices(group: dist.ProcessGroup | None) -> list[torch.device]:
    """The kinds of device whose tensors `group` (None: all ranks) takes; empty where torch does not say.

    It is asked of the group itself: one that was split off another may be described as more than it has.
    """
    return list(getattr(dist.group.WORLD if group is None else group, "_device_types", ()))


def process_groups() -> list[dist.ProcessGroup | None]:
    """All groups of this process, with those of meshes and of DeepSpeed; the default one where torch lists none."""
    groups = getattr(getattr(distributed_c10d, "_world", None), "pg_map", None)
    return [None] if groups is None else list(groups)


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Let collectives of `group` (None: all ranks) wait so long: `torch.distributed.set_timeout`, public since 2.14.

    A group that this rank is not in, or whose backend has no timeout, stays as it is.

    Raises:
        UnsupportedTorch: torch can set no timeout after a group was made.
    """
    public = getattr(dist, "set_timeout", None)
    change = public or required(distributed_c10d, "_set_pg_timeout", "torch.distributed.set_timeout")
    with suppress(ValueError, RuntimeError):
        change(timeout, group)


# -- DDP, FSDP2 and torch.compile -----------------------------------------------------------------------------------


def runs_outside_ddp(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Whether no DDP wrapper is in its forward, though `wrapper` prepares the reduction of gradients there.

    False where torch does not say, so nobody is warned without reason.
    """
    active = getattr(type(wrapper), "_get_active_ddp_module", None)
    by_hooks = getattr(wrapper, "_use_python_reducer", False)  # that reduce whoever called the forward
    return active is not None and not by_hooks and active() is None


def fsdp2_compute_dtype(unit: fsdp.FSDPModule) -> torch.dtype | None:
    """The dtype to which FSDP2 casts the parameters of `unit` for its forward; None: it leaves them as they are.

    Raises:
        UnsupportedTorch: the unit does not tell its policy of mixed precision.
    """
    state = required(unit, "_get_fsdp_state", "FSDPModule._get_fsdp_state")()
    policy = required(state, "_mp_policy", "FSDPState._mp_policy")
    return policy.param_dtype
