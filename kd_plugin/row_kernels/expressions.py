"""`row_pass` as expressions: traced to its aten operations, which become nodes of a graph.

A node is a value of each row, or of each token of a row: of all columns, or of one of the two parts that a student
with more columns than its teacher has. A row is swept over the vocabulary a block of columns at a time; a sum, maximum
or `any` over the vocabulary is known one sweep later than what it is taken of, which gives the number of sweeps. Two
rules save sweeps:

- `max(x - r)` is `max(x) - r`, and likewise for other functions that grow with x;
- `sum(exp(x - max(x)))` is accumulated in the sweep that finds the maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx.node import Argument

from kd_plugin.row_kernels.row_pass import RowSpec, row_pass

INPUTS = ("student", "teacher", "target", "weight", "hard_weight")
"""Arguments of `row_pass` after the spec, as the kernel's parameters call them."""

_ADD, _SUB, _MUL, _DIV, _EXP = "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} / {1}", "tl.exp({0})"
_AT_LEAST = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_AT_MOST = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_OPERATIONS = {  # aten -> Triton; `expm1`, `log1p`, `sign` and `tanh` come from triton_math
    "abs": "tl.abs({0})",
    "add": _ADD,
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "clamp_max": _AT_MOST,
    "clamp_min": _AT_LEAST,
    "div": _DIV,
    "eq": "{0} == {1}",
    "exp": _EXP,
    "expm1": "expm1({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "le": "{0} <= {1}",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "logical_and": "{0} & {1}",
    "lt": "{0} < {1}",
    "maximum": _AT_LEAST,
    "minimum": _AT_MOST,
    "mul": _MUL,
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "reciprocal": "1.0 / {0}",
    "rsub": "{1} - {0}",
    "sgn": "sign({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "sign": "sign({0})",
    "sqrt": "tl.sqrt({0})",
    "sub": _SUB,
    "tanh": "tanh({0})",
    "where": "tl.where({0}, {1}, {2})",
}
_UNCHANGED = ("alias", "clone", "detach", "expand")
_CONSTANTS = {"zeros_like": 0.0, "ones_like": 1.0}

Columns = tuple[int, int]
"""First of some columns, and the one after the last."""


@dataclass(frozen=True, eq=False)
class Node:
    """One value; nodes are equal only if they are the same."""

    template: str
    """Triton expression of the operands; a reduction's kind; or an input's name."""
    operands: tuple[Node, ...]
    columns: Columns | None
    """Columns of a value per token, which is computed a block of them at a time; None: one number per row."""
    sweep: int
    """The sweep over the vocabulary after which it can be computed; 0: before the first."""
    reduction: bool = False
    constant: float | None = None

    @property
    def per_token(self) -> bool:
        """Whether there is a value for each column."""
        return self.columns is not None


class _Graph:
    """Nodes in the order of their making; equal expressions are one node."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[str, tuple[Node, ...], Columns | None], Node] = {}

    def _keep(self, node: Node) -> Node:
        return self.nodes.setdefault((node.template, node.operands, node.columns), node)

    def input(self, name: str, columns: Columns | None) -> Node:
        return self._keep(Node(name, (), columns, sweep=0))

    def constant(self, value: float) -> Node:
        text = repr(float(value)) if abs(value) < float("inf") else f'float("{value}")'
        return self._keep(Node(text, (), columns=None, sweep=0, constant=float(value)))

    def apply(self, template: str, *operands: Node) -> Node:
        parts = {operand.columns for operand in operands if operand.columns is not None}
        assert len(parts) < 2, "the two parts of a row meet in numbers per row only"
        columns = next(iter(parts), None)
        return self._keep(Node(template, operands, columns, max(operand.sweep for operand in operands)))

    def reduce(self, kind: str, x: Node) -> Node:
        return self._keep(Node(kind, (x,), columns=None, sweep=x.sweep + 1, reduction=True))

    def max(self, x: Node) -> Node:
        if not x.per_token:
            return x
        if len(x.operands) == 2:
            first, second = x.operands
            positive = second.constant is not None and second.constant > 0
            grows = x.template in (_ADD, _SUB, _AT_LEAST) or (x.template in (_MUL, _DIV) and positive)
            if grows and not second.per_token:
                return self.apply(x.template, self.max(first), second)
        return self.reduce("max", x)

    def sum(self, x: Node, count: int) -> Node:
        """Over `count` columns."""
        if not x.per_token:
            return self.apply(_MUL, x, self.constant(count))
        if x.template == _EXP and x.operands[0].template == _SUB:
            logits, maximum = x.operands[0].operands
            if maximum is self.max(logits):
                return self.reduce("sum_exp", logits)
        return self.reduce("sum", x)

    def any(self, x: Node) -> Node:
        return self.reduce("any", x) if x.per_token else x

    def mean(self, x: Node, count: int) -> Node:
        return self.apply(_DIV, self.sum(x, count), self.constant(count))


class Unsupported(ValueError):
    """An operation that the generated kernel has no expression for."""


def _operand(node: torch.fx.Node, index: int) -> torch.fx.Node:
    """The argument of `node` that is a node itself."""
    operand = node.args[index]
    assert isinstance(operand, torch.fx.Node)
    return operand


def _width(node: torch.fx.Node) -> int:
    """Columns of the value of `node`, as traced."""
    return node.meta["val"].shape[1]


class _Converter:
    """aten graph of `row_pass` -> nodes; only what the results need is visited."""

    def __init__(self, inputs: dict[torch.fx.Node, str]) -> None:
        self.graph = _Graph()
        self._inputs = inputs
        self._done: dict[torch.fx.Node, Node] = {}

    def convert(self, value: Argument) -> Node:
        if isinstance(value, (bool, int, float)):
            return self.graph.constant(value)
        assert isinstance(value, torch.fx.Node)
        if value not in self._done:
            self._done[value] = self._node(value)
        return self._done[value]

    def input_of(self, node: torch.fx.Node) -> tuple[str, Columns | None] | None:
        """Name and columns of an input, or of a slice of its columns; None for any other node."""
        source, start = node, 0
        if node.target is torch.ops.aten.slice.Tensor and node.args[1] == 1:
            source, start = _operand(node, 0), node.args[2]
        assert isinstance(start, int)
        name = self._inputs.get(source)
        if name is None:
            return None
        return name, (start, start + _width(node)) if name in INPUTS[:2] else None

    def _node(self, node: torch.fx.Node) -> Node:
        if (argument := self.input_of(node)) is not None:
            return self.graph.input(*argument)
        packet = getattr(node.target, "overloadpacket", None)  # of an operator of ATen
        name = "" if packet is None else packet.__name__
        args, kwargs = node.args, node.kwargs
        if name in _UNCHANGED:
            return self.convert(args[0])
        if name in _CONSTANTS:
            return self.graph.constant(_CONSTANTS[name])
        if name in ("scalar_tensor", "full", "full_like"):
            value = args[0 if name == "scalar_tensor" else 1]
            assert isinstance(value, (bool, int, float))
            return self.graph.constant(value)
        if name == "_to_copy" and kwargs.get("dtype") == torch.float32:
            x = self.convert(args[0])
            return x if x.constant is not None else self.graph.apply("{0}.to(tl.float32)", x)
        if name in ("amax", "any", "mean", "sum") and args[1] in (-1, 1, [-1], [1]) and args[2:] == (True,):
            x, count = self.convert(args[0]), _width(_operand(node, 0))
            if name in ("mean", "sum"):
                return (self.graph.mean if name == "mean" else self.graph.sum)(x, count)
            return (self.graph.max if name == "amax" else self.graph.any)(x)
        if name == "pow" and isinstance(exponent := args[1], (int, float)) and exponent in (1, 2, 3):
            x = self.convert(args[0])
            return functools.reduce(lambda power, _: self.graph.apply(_MUL, power, x), range(1, int(exponent)), x)
        if name == "clamp":
            low, high = (*args[1:], None)[:2]
            x = self.convert(args[0])
            x = x if low is None else self.graph.apply(_AT_LEAST, x, self.convert(low))
            return x if high is None else self.graph.apply(_AT_MOST, x, self.convert(high))
        if name not in _OPERATIONS or kwargs:
            raise Unsupported(str(node.target))
        return self.graph.apply(_OPERATIONS[name], *map(self.convert, args))


def _aten_graph(spec: RowSpec, widths: tuple[int, int], given: tuple[str, ...]) -> torch.fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx  # heavy

    def body(*tensors: torch.Tensor) -> torch.Tensor:
        by_name = dict(zip(given, tensors, strict=True))
        others = (by_name.get(name) for name in INPUTS[1:])
        return row_pass(spec, by_name[INPUTS[0]], *others)

    width_of: dict[str, int] = dict(zip(INPUTS, widths, strict=False))
    sizes = [width_of.get(name, 1) for name in given]
    with torch.no_grad():  # two rows, so that a user's function cannot mistake a row for a number
        return make_fx(body)(*(torch.empty(2, size, dtype=torch.float32, device="meta") for size in sizes)).graph


class Expressions(NamedTuple):
    """What a row pass computes."""

    nodes: list[Node]
    """All there are, operands first; not all are needed."""
    statistics: list[Node]
    gradients: dict[Columns, Node]
    """What is written over which of the student's columns."""


def trace(spec: RowSpec, vocab_size: int, given: tuple[str, ...], teacher_size: int | None = None) -> Expressions:
    """The expressions of `row_pass` for `spec`.

    Args:
        spec: the objective and what both models do to their logits.
        vocab_size: logits of a row of the student's.
        given: names of `row_pass`'s arguments that are not None.
        teacher_size: logits of a row of the teacher's; None: as many as the student's.

    Raises:
        Unsupported: an operation (of a registered divergence, or a sort) has no Triton expression.
    """
    traced = _aten_graph(spec, (vocab_size, teacher_size or vocab_size), given)
    placeholders = traced.find_nodes(op="placeholder")
    converter = _Converter(dict(zip(placeholders, given, strict=True)))
    gradients: dict[Columns, Node] = {}
    for node in traced.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written = converter.input_of(_operand(node, 0))
        assert written is not None and written[0] == "student" and written[1] is not None
        gradients[written[1]] = converter.convert(node.args[1])
    assert bool(gradients) == spec.with_gradient
    result = _operand(traced.find_nodes(op="output")[0], 0)
    assert result.target is torch.ops.aten.cat.default
    columns = result.args[0]
    assert isinstance(columns, Sequence)
    statistics = [converter.convert(column) for column in columns]
    return Expressions(list(converter.graph.nodes.values()), statistics, gradients)
