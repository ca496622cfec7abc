"""What a graph costs: parameters, FLOPs, bytes moved, peak activation memory and streaming state.

    cost = profile(graph)
    print(cost.params, cost.flops)

Only live nodes count. A parameter read in two places is one parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.ops.shape import Reshape
from ir.ops.structure import Component, Constant, Input, Parameter
from ir.passes.unroll_loops import UnrollLoops

STATE_PREFIX = "state."
"""Inputs of a step graph whose names begin so are what is carried from token to token."""


@dataclass(frozen=True)
class Cost:
    """Cost of one evaluation of a graph.

    Attributes:
        params: Elements of the parameters that are trained.
        param_bytes: Bytes of all parameters.
        flops: Floating-point operations; a multiply-add counts two.
        macs: Multiply-adds of matrix products, convolutions, attention and recurrences, which papers print as FLOPs.
        bytes_moved: Bytes read and written if nothing stayed in cache between nodes.
        peak_activation_bytes: Most bytes of inputs and intermediate values alive at once, nodes run in order.
    """

    params: int
    param_bytes: int
    flops: int
    macs: int
    bytes_moved: int
    peak_activation_bytes: int


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node.

    Attributes:
        node: The node.
        flops: Its floating-point operations.
        macs: Its multiply-adds, see `Cost`.
        bytes_moved: Bytes it reads and writes.
    """

    node: Node
    flops: int
    macs: int
    bytes_moved: int


def profile(graph: Graph) -> Cost:
    """Add up the cost of a graph.

    Raises:
        GraphError: The graph holds component nodes, whose cost only their bodies tell.
    """
    costs = node_costs(graph)
    parameters = [cost.node.op for cost in costs if isinstance(cost.node.op, Parameter)]
    return Cost(
        params=sum(parameter.infer().size for parameter in parameters if parameter.trained),
        param_bytes=sum(parameter.infer().size_bytes for parameter in parameters),
        flops=sum(cost.flops for cost in costs),
        macs=sum(cost.macs for cost in costs),
        bytes_moved=sum(cost.bytes_moved for cost in costs),
        peak_activation_bytes=peak_activation_bytes(UnrollLoops().run(graph)),
    )


def node_costs(graph: Graph) -> tuple[NodeCost, ...]:
    """Cost of each live node, in order.

    Raises:
        GraphError: The graph holds component nodes.
    """
    return tuple(_node_cost(graph, node) for node in graph.nodes if node.id in graph.live)


def _node_cost(graph: Graph, node: Node) -> NodeCost:
    if isinstance(node.op, Component):
        raise GraphError("a component has no cost by itself", where=node.path, hint="run expand_components first")
    operands = graph.operand_types(node)
    op = node.op
    return NodeCost(
        node, op.flops(operands, node.types), op.macs(operands, node.types), op.bytes_moved(operands, node.types)
    )


def peak_activation_bytes(graph: Graph) -> int:
    """Most bytes alive at once, from the lifetimes of values.

    A value lives from its node to its last reader, an output to the end; a node's operands and results are alive
    together. Inputs are alive from the start. A reshape shares its operand's memory. Parameters and constants are not
    activations.
    """
    nodes = [node for node in graph.nodes if node.id in graph.live]
    storage = _storage(nodes)
    last_use = {value: position for position, node in enumerate(nodes) for value in _read(node, storage)}
    last_use.update({storage[value]: len(nodes) for _, value in graph.outputs})
    sizes = {value: kind.size_bytes for node in nodes for value, kind in zip(node.results, node.types, strict=True)}
    alive = {value for node in nodes if isinstance(node.op, Input) for value in node.results}
    peak = now = sum(sizes[value] for value in alive)
    for position, node in enumerate(nodes):
        if not isinstance(node.op, Parameter | Constant):
            made = [value for value in node.results if storage[value] == value and value not in alive]
            alive.update(made)
            now += sum(sizes[value] for value in made)
        peak = max(peak, now)
        touched = {*_read(node, storage), *(storage[value] for value in node.results)}
        ended = [value for value in touched & alive if last_use.get(value, position) <= position]
        alive.difference_update(ended)
        now -= sum(sizes[value] for value in ended)
    return peak


def _storage(nodes: list[Node]) -> dict[Value, Value]:
    """The value whose memory each value lies in."""
    storage: dict[Value, Value] = {}
    for node in nodes:
        for value in node.results:
            storage[value] = storage[node.operands[0]] if isinstance(node.op, Reshape) else value
    return storage


def _read(node: Node, storage: dict[Value, Value]) -> list[Value]:
    return [storage[operand] for operand in node.operands]


def state_bytes(step_graph: Graph) -> int:
    """Bytes that a step graph carries from token to token: its inputs named `state.*`."""
    states = [node for name, node in step_graph.inputs.items() if name.startswith(STATE_PREFIX)]
    return sum(node.types[0].size_bytes for node in states)
