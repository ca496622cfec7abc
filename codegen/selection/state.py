"""What the rounds of the selection share: the calls made so far, and who reads what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from codegen.kernels.base import Kernel
from ir.graph import Graph, Node, Value
from ir.ops.structure import Constant


@dataclass(frozen=True)
class Static:
    """An array known when the model is compiled: static values, concatenated along the last axis.

    Attributes:
        values: Static values of the graph, one or more.
        transpose: Whether each is used with its last two axes swapped.
    """

    values: tuple[Value, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Table:
    """An array that the kernel itself asks for."""

    constant: Constant


Operand = Value | Static | Table


@dataclass(frozen=True)
class KernelCall:
    """One kernel with what it reads and makes.

    Attributes:
        kernel: The workload.
        operands: For each input of the kernel, a run-time value or an array known now.
        results: For each output of the kernel, the value it holds.
        nodes: Numbers of the nodes it serves.
    """

    kernel: Kernel
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    nodes: tuple[int, ...]


@dataclass
class Selection:
    """State of the selection over one graph."""

    graph: Graph
    static: frozenset[int]
    outputs: frozenset[Value]
    calls: list[KernelCall] = field(default_factory=list[KernelCall])
    served: dict[int, KernelCall] = field(default_factory=dict[int, KernelCall])

    def add(self, kernel: Kernel, operands: Sequence[Operand], results: Sequence[Value], nodes: Sequence[int]) -> None:
        """Serve nodes by a kernel; operands that are static become arrays."""
        wrapped = tuple(
            Static((operand,)) if isinstance(operand, Value) and operand.node in self.static else operand
            for operand in operands
        )
        call = KernelCall(kernel, wrapped, tuple(results), tuple(nodes))
        self.calls.append(call)
        self.served.update(dict.fromkeys(nodes, call))

    def is_free(self, node: Node) -> bool:
        """Whether a node still needs a kernel."""
        return node.id not in self.served and node.id not in self.static

    def only_user(self, value: Value) -> Node | None:
        """The one node that reads a value, if nothing else needs it."""
        users = self.graph.users(value)
        return users[0] if len(users) == 1 and value not in self.outputs and self.is_free(users[0]) else None

    def producer(self, value: Value) -> Node:
        """The node that makes a value."""
        return self.graph.node(value.node)


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor seen as a matrix: the product of all axes but the last."""
    return math.prod(shape[:-1])
