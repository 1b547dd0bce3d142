"""The names of torch.compile that are private, or that only some releases have: each is used here alone.

As in `torch_internals`, which has all others: what is missing is said by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, cast

import torch
import torch.fx.experimental
from torch import Tensor, nn

from kd_plugin.distributed.torch_internals import required


def original_of_compiled(module: object) -> nn.Module | None:
    """The module inside `torch.compile(module)`; None for one that is not compiled so."""
    return cast("nn.Module | None", getattr(module, "_modules", {}).get("_orig_mod"))


def compiled_alone(body: Callable[..., Any], *, max_graphs: int, **options: Any) -> Callable[..., Any]:
    """`body` by `torch.compile(**options)`: at most `max_graphs`, apart from those of other calls with its code."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(body, **options, **{"isolate_recompiles": True, "recompile_limit": max_graphs})
    alone = torch.compile(_with_code_of_its_own(body), **options)

    def limited(*args: Any, **kwargs: Any) -> Any:
        with _dynamo("config.patch")(recompile_limit=max_graphs):
            return alone(*args, **kwargs)

    return limited


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """`graph` by torch.compile's own backend, with its backward, where torch can be told not to put that one off.

    Raises:
        Exception: of any kind, where the backend fails.
        UnsupportedTorch: torch has no such backend.
    """
    config: Any = getattr(getattr(torch, "_functorch", None), "config", None)
    name = "force_non_lazy_backward_lowering"
    with config.patch({name: True}) if hasattr(config, name) else nullcontext():
        return _dynamo("lookup_backend")("inductor")(graph, inputs)


def equal_sizes_may_differ() -> AbstractContextManager[None]:
    """What is compiled in the body takes no two sizes for one that were equal by chance, where torch can be told so."""
    config: Any = getattr(torch.fx.experimental, "_config", None)
    return config.patch(use_duck_shape=False) if hasattr(config, "use_duck_shape") else nullcontext()


def compile_error() -> type[Exception]:
    """What torch.compile raises, by its frontend or its backend, before anything that is compiled has run.

    Raises:
        UnsupportedTorch: torch has no such class.
    """
    return _dynamo("exc.TorchDynamoException")


def restart_of_compile() -> type[Exception]:
    """What torch.compile raises, through its backend too, to begin with a graph anew."""
    return _dynamo("exc.RestartAnalysis")


def _with_code_of_its_own(body: Callable[..., Any]) -> Callable[..., Any]:
    """A call of `body` by a function whose code is no other's: by its code torch before 2.13 finds what it compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def floats_as_constants() -> AbstractContextManager[None]:
    """What is compiled in the body takes Python's floats for constants of the graph, not for inputs that could vary.

    Raises:
        UnsupportedTorch: torch.compile cannot be told so.
    """
    return _dynamo("config.patch")(specialize_float=True)


def mark_dim_dynamic(tensor: Tensor, dim: int) -> None:
    """Tell torch.compile that this size varies, unless it finds that the graph needs it constant.

    Raises:
        UnsupportedTorch: torch.compile cannot be told so.
    """
    _dynamo("maybe_mark_dynamic")(tensor, dim)


def _dynamo(path: str) -> Any:
    owner: Any = required(torch, "_dynamo", "torch._dynamo")
    for name in path.split("."):
        owner = required(owner, name, f"torch._dynamo.{path}")
    return owner
