"""What autograd hands to a function of ours, by its types: torch's own have `Any`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import Tensor
from torch.autograd import function

_Backward = TypeVar("_Backward", bound=Callable[..., object])


class Context(Protocol):
    """The `ctx` of a forward and its backward; a function's own attributes follow in a protocol of its own."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that `save_for_backward` was given, to be read in backward; None where None was saved."""
        ...

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for backward; to be called in forward."""
        ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Say which results of forward get no gradient; to be called in forward."""
        ...


def once_differentiable(backward: _Backward) -> _Backward:
    """torch's decorator for a backward that has no derivative itself."""
    return cast("_Backward", function.once_differentiable(backward))
