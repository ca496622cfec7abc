"""A body that runs several times.

Shape letters: none; what is carried has any shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ir.op import Array, Op, Types, op, require
from ir.types import TensorType

if TYPE_CHECKING:
    from ir.cost import NodeCost
    from ir.graph import Graph


@dataclass(frozen=True, eq=False, repr=False)
class Body:
    """The graph of a loop, as an attribute: equal to another that prints alike.

    Attributes:
        graph: Inputs and outputs in the order of the loop's operands and results; no parameters and no components.
    """

    graph: Graph

    def __str__(self) -> str:
        from ir.text import print_graph

        return print_graph(self.graph)

    def __repr__(self) -> str:
        from ir.hashing import ordered_hash

        return f"Body({ordered_hash(self.graph)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Body) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@op
class Loop(Op):
    """Run a body `times` times, each turn on what the one before gave.

    Operands: what is carried from turn to turn, then what every turn reads as it is, parameters among it. The body has
    an input for each; its outputs are the carried values after a turn. Results: those after the last turn.
    """

    times: int
    body: Body

    def infer(self, *operands: TensorType) -> Types:
        graph = self.body.graph
        inputs = tuple(node.types[0] for node in graph.inputs.values())
        results = tuple(graph.type_of(value) for _, value in graph.outputs)
        require(self.times >= 1, "a loop runs at least once", expected="times of at least 1", found=self.times)
        require(operands == inputs, "operands do not fit the body", expected=_listed(inputs), found=_listed(operands))
        carried = inputs[: len(results)]
        require(results == carried, "a turn changes types", expected=_listed(carried), found=_listed(results))
        return results

    def evaluate(self, *operands: Array) -> tuple[Array, ...]:
        from ir.interpret import evaluate

        graph = self.body.graph
        dtype = np.result_type(*(x.dtype for x in operands if x.dtype.kind == "f"), np.float32)
        values = dict(zip(graph.inputs, operands, strict=True))
        for _ in range(self.times):
            results = evaluate(graph, values, {}, dtype=dtype)
            values.update(zip(graph.inputs, results.values(), strict=False))  # what is carried stands first
        return tuple(values[name] for name, _ in zip(graph.inputs, graph.outputs, strict=False))

    def flops(self, operands: Types, results: Types) -> int:
        return self.times * sum(cost.flops for cost in self._costs())

    def macs(self, operands: Types, results: Types) -> int:
        return self.times * sum(cost.macs for cost in self._costs())

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return self.times * sum(cost.bytes_moved for cost in self._costs())

    def _costs(self) -> tuple[NodeCost, ...]:
        from ir.cost import node_costs

        return node_costs(self.body.graph)


def _listed(types: Types) -> str:
    return ", ".join(map(str, types)) or "nothing"
