"""The decoder layers of student and teacher by torch.compile, region by region.

Notable decisions:
- only the forward of a layer is compiled, in place: classes, parameter names, hooks, units of FSDP and activation
  checkpointing stay, and what a wrapper does around a layer stays outside of the graph;
- layers of one kind share their graphs, so that thirty layers take the time of one;
- sizes vary from the first graph on: neither ragged batches nor an evaluation in other sizes compile anything anew,
  but for one sequence alone, which torch takes for a constant;
- forward and backward are compiled together, in the first step; an evaluation before it runs eager. What Inductor
  cannot compile runs as it was captured, which is known before any of it has run: no step is half done.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from kd_plugin.distributed import compiler_internals
from kd_plugin.distributed.uncompiled import say_eager
from kd_plugin.engines.fsdp_units import decoder_layers

__all__ = ["compile_layers"]

logger = logging.getLogger(__name__)

# As many graphs for each layer as torch allows one function: some layers differ in a number that is part of the graph.
_GRAPHS_PER_LAYER = 8


def compile_layers(models: Mapping[str, nn.Module]) -> None:
    """Have the decoder layers of each model (by its role, for the log) compiled when they first run.

    Call it before a wrapper takes the models.

    Raises:
        ShardingError: a model names no decoder layers.
    """
    backend = _Fallible()
    # One that has been given a forward of its own keeps it.
    layers = {role: [x for x in decoder_layers(model) if "forward" not in vars(x)] for role, model in models.items()}
    for role, of_model in layers.items():
        run = _CompiledForward(role, backend, max_graphs=_GRAPHS_PER_LAYER * len(of_model)).run
        for layer in of_model:
            layer.forward = MethodType(run, layer)
    counts = " and ".join(f"{len(of_model)} layers of the {role}" for role, of_model in layers.items())
    logger.info("train.compile: compiling %s as they first run, a minute or two", counts)


class _Fallible:
    """Inductor, after whose first failure all graphs run as they were captured."""

    def __init__(self) -> None:
        self.failed = False
        self.started = False
        """A forward with gradients has come. Until then `attach` waits for it at every module, where graphs break."""
        self.num_graphs = 0
        """Graphs that torch.compile has found, compiled or not."""

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made = graph.forward if self.failed else self._made(graph, inputs)
        self.num_graphs += 1
        return made

    def _made(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            return compiler_internals.inductor(graph, inputs)
        except compiler_internals.restart_of_compile():  # no failure: it is called again
            raise
        except Exception as error:  # of any kind: a compiler that is not there, or a fault of this release of torch
            self.give_up(error)
            return graph.forward

    def give_up(self, error: Exception) -> None:
        """Compile nothing any more, and say why."""
        self.failed = True
        say_eager("train.compile", error, "set train.compile to false")


class _CompiledForward:
    """The forward of each layer of one model, whose graphs the layers share."""

    def __init__(self, role: str, backend: _Fallible, *, max_graphs: int) -> None:
        self._role, self._backend = role, backend
        self._compiled: Callable[..., Any]
        self._compiled = compiler_internals.compiled_alone(
            _forward, max_graphs=max_graphs, backend=backend, dynamic=True
        )
        self._seen: set[tuple[str, bool, bool]] = set()

    def run(self, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """What the class of `layer`, which a wrapper may have changed by now, makes of the arguments."""
        if torch.is_grad_enabled():
            self._backend.started = True
        elif not self._backend.started:
            return _forward(layer, *args, **kwargs)
        with_gradients = torch.is_grad_enabled()
        # Above a frozen embedding, the first layer's input has no gradient, and the others' have: another graph
        inputs = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        kind = type(layer).__name__, with_gradients, with_gradients and any(each.requires_grad for each in inputs)
        with compiler_internals.floats_as_constants(), compiler_internals.equal_sizes_may_differ():
            run = partial(self._compiled, layer, *args, **kwargs)
            if kind in self._seen:
                return run()
            before, start = self._backend.num_graphs, time.perf_counter()
            try:
                result = self._first(run)
            except compiler_internals.compile_error() as error:
                if self._backend.num_graphs > before:  # a part of the layer may have run
                    raise
                self._give_up(error)
                return _forward(layer, *args, **kwargs)
            self._seen.add(kind)
            self._say(kind, self._backend.num_graphs - before, time.perf_counter() - start)
            return result

    def _first(self, run: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            # torch.compile itself reads it
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
            return run()

    def _give_up(self, error: Exception) -> None:
        """Leave out torch.compile, whose frontend has failed."""
        self._compiled = _forward
        if not self._backend.failed:
            self._backend.give_up(error)

    def _say(self, kind: tuple[str, bool, bool], num_graphs: int, seconds: float) -> None:
        """What came of the first run of a layer of this kind."""
        if self._backend.failed:
            return  # and it is said
        name, with_gradients, _ = kind
        doing = f"{self._role}'s {name} {'with' if with_gradients else 'without'} gradients"
        if num_graphs:
            logger.info("train.compile: compiled the %s in %.0f s, graphs: %d", doing, seconds, num_graphs)
        elif not any(seen[:2] == kind[:2] for seen in self._seen - {kind}):  # else it is said
            logger.warning("train.compile: torch.compile finds no graph in the %s, which runs eager", doing)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
