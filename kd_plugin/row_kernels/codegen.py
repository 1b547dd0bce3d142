"""Triton source from `row_pass` itself, so that no formula is written a second time.

One program per row. The sweeps over the vocabulary follow from the expressions (see `expressions`); the gradient
is written in the last one, over the student's logits. Forward KL with cross-entropy takes two sweeps. Columns that
only the student has are swept by loops of their own beside the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from kd_plugin.row_kernels.expressions import INPUTS, Columns, Expressions, Node, trace
from kd_plugin.row_kernels.row_pass import RowSpec

# Below every logit, and finite: a difference of two of them is no NaN.
_LOWEST = "-3.0e38"


class Source(NamedTuple):
    """A kernel's source and how to call it."""

    text: str
    inputs: tuple[str, ...]
    """Names from `INPUTS` that it reads; each is passed as a tensor and its row stride, statistics come last."""
    sweeps: int


def generate(spec: RowSpec, vocab_size: int, given: tuple[str, ...], teacher_size: int | None = None) -> Source:
    """The kernel `row_kernel`; arguments and errors as in `expressions.trace`."""
    return _Writer(trace(spec, vocab_size, given, teacher_size)).source()


def _reachable(roots: list[Node], *, within: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    reached: set[Node] = set()
    stack = [root for root in roots if within(root)]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(operand for operand in node.operands if within(operand))
    return reached


class _Writer:
    """Nodes -> source."""

    def __init__(self, expressions: Expressions) -> None:
        self.statistics, self.gradients = expressions.statistics, expressions.gradients
        live = _reachable([*self.statistics, *self.gradients.values()])
        self.nodes = [node for node in expressions.nodes if node in live and node.constant is None]
        self.names = {node: f"{'t' if node.per_token else 'r'}{i}" for i, node in enumerate(self.nodes)}
        self.names |= {node: node.template for node in live if node.constant is not None}
        self.names |= {node: node.template for node in live if node.template in INPUTS}
        self.sweeps = max([node.sweep for node in self.nodes], default=0)
        self.sweeps = max([self.sweeps, *(gradient.sweep + 1 for gradient in self.gradients.values())])
        self.parts = sorted({node.columns for node in self.nodes if node.columns is not None} | self.gradients.keys())
        self.maxima = {node.operands: node for node in self.nodes if node.template == "max"}
        self.lines: list[str] = []

    def source(self) -> Source:
        inputs = tuple(name for name in INPUTS if name in {node.template for node in self.nodes})
        parameters = [f"{name}_ptr, {name}_stride" for name in inputs]
        self._line(0, f"def row_kernel({', '.join(parameters)}, statistics_ptr, BLOCK: tl.constexpr):")
        self._line(1, "row = tl.program_id(0).to(tl.int64)")
        for name in inputs:
            per_token = name in INPUTS[:2]
            place = f"{name}_ptr + row * {name}_stride"
            self._line(1, f"{name}_row = {place}" if per_token else f"{name} = tl.load({place})")
        self._rows(0)
        for sweep in range(1, self.sweeps + 1):
            for columns in self.parts:
                self._sweep(sweep, columns)
            self._rows(sweep)
        for i, node in enumerate(self.statistics):
            self._line(1, f"tl.store(statistics_ptr + row * {len(self.statistics)} + {i}, {self.names[node]})")
        return Source("\n".join(self.lines) + "\n", inputs, self.sweeps)

    def _line(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def _assign(self, depth: int, node: Node) -> None:
        expression = node.template.format(*(self.names[operand] for operand in node.operands))
        self._line(depth, f"{self.names[node]} = {expression}")

    def _rows(self, sweep: int) -> None:
        """Values of the row that are known after `sweep`."""
        for node in self.nodes:
            if node.sweep == sweep and node.operands and not node.per_token and not node.reduction:
                self._assign(1, node)

    def _sweep(self, sweep: int, columns: Columns) -> None:
        reductions = [node for node in self.nodes if node.reduction and node.sweep == sweep]
        reductions = [node for node in reductions if node.operands[0].columns == columns]
        gradient = self.gradients.get(columns) if sweep == self.sweeps else None
        roots = [node.operands[0] for node in reductions] + ([gradient] if gradient else [])
        if not roots:
            return
        tokens = _reachable(roots, within=operator.attrgetter("per_token"))
        for node in reductions:
            self._start(node)
        self._line(1, f"for start in range({columns[0]}, {columns[1]}, BLOCK):")
        self._line(2, "columns = start + tl.arange(0, BLOCK)")
        self._line(2, f"inside = columns < {columns[1]}")
        for node in self.nodes:
            if node in tokens and node.template in INPUTS:
                name = node.template
                self._line(2, f"{name} = tl.load({name}_row + columns, mask=inside, other=0.0)")
        for node in self.nodes:
            if node in tokens and node.operands:
                self._assign(2, node)
        for node in sorted(reductions, key=lambda node: node.template == "max"):  # sum_exp reads the old maximum
            self._accumulate(node)
        if gradient:
            self._line(2, f"tl.store(student_row + columns, {self.names[gradient]}, mask=inside)")
        for node in reductions:
            self._finish(node)

    # Accumulators are blocks, one partial result per lane: no exchange between threads until the sweep's end,
    # and a sum of 150k numbers rounds like a sum of a few dozen.

    def _start(self, node: Node) -> None:
        name = self.names[node]
        if node.template == "any":
            self._line(1, f"{name}_lanes = tl.zeros([BLOCK], tl.int1)")
        elif node.template == "max":
            self._line(1, f"{name}_lanes = tl.full([BLOCK], {_LOWEST}, tl.float32)")
        else:
            self._line(1, f"{name}_lanes = tl.zeros([BLOCK], tl.float32)")
        if self._top(node) == f"{name}_top":
            self._line(1, f"{name}_top = tl.full([BLOCK], {_LOWEST}, tl.float32)")

    def _top(self, node: Node) -> str:
        """The block of running maxima that a `sum_exp` refers to: that of the maximum itself if it is needed too."""
        if node.template != "sum_exp":
            return ""
        maximum = self.maxima.get(node.operands)
        return f"{self.names[node]}_top" if maximum is None else f"{self.names[maximum]}_lanes"

    def _accumulate(self, node: Node) -> None:
        name, value = self.names[node], self.names[node.operands[0]]
        if node.template == "any":
            self._line(2, f"{name}_lanes = {name}_lanes | (inside & {value})")
        elif node.template == "max":
            masked = f'tl.where(inside, {value}, float("-inf"))'
            self._line(2, f"{name}_lanes = tl.maximum({name}_lanes, {masked})")
        elif node.template == "sum":
            self._line(2, f"{name}_lanes += tl.where(inside, {value}, 0.0)")
        else:  # one exponential either way: of the new value, or to scale the sum to a new maximum
            top = self._top(node)
            self._line(2, f'{name}_x = tl.where(inside, {value}, float("-inf"))')
            self._line(2, f"{name}_e = tl.exp(-tl.abs({name}_x - {top}))")
            grown, added = f"{name}_lanes * {name}_e + 1.0", f"{name}_lanes + {name}_e"
            self._line(2, f"{name}_lanes = tl.where({name}_x > {top}, {grown}, {added})")
            if top == f"{name}_top":
                self._line(2, f"{top} = tl.maximum({top}, {name}_x)")

    def _finish(self, node: Node) -> None:
        name, top = self.names[node], self._top(node)
        result = {
            "any": f"tl.max({name}_lanes.to(tl.int32), 0) != 0",
            "max": f"tl.max({name}_lanes, 0)",
            "sum": f"tl.sum({name}_lanes, 0)",
            "sum_exp": f"tl.sum({name}_lanes * tl.exp({top} - tl.max({top}, 0)), 0)",
        }
        self._line(1, f"{name} = {result[node.template]}")
