"""A frozen, verified graph of operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import networkx as nx

from ir.errors import GraphError
from ir.op import Op
from ir.ops.structure import Input, Parameter
from ir.types import TensorType


@dataclass(frozen=True, order=True)
class Value:
    """Result number `index` of node `node`."""

    node: int
    index: int = 0


@dataclass(frozen=True)
class Node:
    """One operation applied to values.

    Attributes:
        id: Number of the node; every operand comes from a smaller number.
        op: The operation with its attributes.
        operands: Values read.
        types: Result types.
        scope: Where in the model it stands, such as `layers.3.mixer`; empty at the top.
    """

    id: int
    op: Op
    operands: tuple[Value, ...]
    types: tuple[TensorType, ...]
    scope: str = ""

    @property
    def results(self) -> tuple[Value, ...]:
        """The values this node makes."""
        return tuple(Value(self.id, index) for index in range(len(self.types)))

    @property
    def path(self) -> str:
        """Scope, operation and number, for messages: `layers.3.mixer/matmul_12`."""
        return f"{self.scope}/{self.op.name}_{self.id}" if self.scope else f"{self.op.name}_{self.id}"


class Graph:
    """Nodes in topological order with named inputs, parameters and outputs; immutable.

    Args:
        nodes: Nodes whose operands all stand earlier in the sequence.
        outputs: Name and value of each output.
        name: A label for people; not part of the meaning.

    Raises:
        GraphError: An operand is unknown or comes later, an id or a name is repeated, or there is no output.
    """

    __slots__ = ("__dict__", "__weakref__", "_numbered", "name", "nodes", "outputs")

    def __init__(self, nodes: Iterable[Node], outputs: Iterable[tuple[str, Value]], *, name: str = "main") -> None:
        self.nodes: tuple[Node, ...] = tuple(nodes)
        self.outputs: tuple[tuple[str, Value], ...] = tuple(outputs)
        self.name = name
        self._numbered: dict[int, Node] = {}
        self._connect()

    def _connect(self) -> None:
        for node in self.nodes:
            if node.id in self._numbered:
                raise GraphError("a node number is used twice", where=node.path)
            for operand in node.operands:
                if not self._has(operand):
                    raise self._unknown(operand, node.path)
            self._numbered[node.id] = node
        if not self.outputs:
            raise GraphError("a graph needs at least one output", where=self.name)
        for name, value in self.outputs:
            if not self._has(value):
                raise self._unknown(value, f"output {name}")
        _require_distinct([name for name, _ in self.outputs], "output")
        _require_distinct([node.op.label for node in self.nodes if isinstance(node.op, Input)], "input")
        _require_distinct([node.op.label for node in self.nodes if isinstance(node.op, Parameter)], "parameter")

    def _has(self, value: Value) -> bool:
        made = self._numbered.get(value.node)
        return made is not None and 0 <= value.index < len(made.types)

    def _unknown(self, value: Value, where: str) -> GraphError:
        if value.node in self._numbered:
            return GraphError("no such result", where=where, found=f"%{value.node}.{value.index}")
        return GraphError("operand is not an earlier node", where=where, found=f"%{value.node}")

    def node(self, number: int) -> Node:
        """The node of a number."""
        return self._numbered[number]

    def type_of(self, value: Value) -> TensorType:
        """Type of a value."""
        return self.node(value.node).types[value.index]

    def operand_types(self, node: Node) -> tuple[TensorType, ...]:
        """Types of a node's operands."""
        return tuple(self.type_of(operand) for operand in node.operands)

    @cached_property
    def inputs(self) -> Mapping[str, Node]:
        """Input nodes by name, in order of definition."""
        return MappingProxyType({node.op.label: node for node in self.nodes if isinstance(node.op, Input)})

    @cached_property
    def parameters(self) -> Mapping[str, Node]:
        """Parameter nodes by name, in order of definition."""
        return MappingProxyType({node.op.label: node for node in self.nodes if isinstance(node.op, Parameter)})

    @cached_property
    def _users(self) -> Mapping[Value, tuple[Node, ...]]:
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands):
                users.setdefault(operand, []).append(node)
        return {value: tuple(nodes) for value, nodes in users.items()}

    def users(self, value: Value) -> tuple[Node, ...]:
        """Nodes that read a value, each once, in order."""
        return self._users.get(value, ())

    @cached_property
    def live(self) -> frozenset[int]:
        """Numbers of the nodes that some output depends on."""
        seen = {value.node for _, value in self.outputs}
        for node in reversed(self.nodes):
            if node.id in seen:
                seen.update(operand.node for operand in node.operands)
        return frozenset(seen)

    def to_networkx(self) -> nx.DiGraph[int]:
        """A copy of the node graph: numbers as nodes, `node` as their attribute."""
        made: nx.DiGraph[int] = nx.DiGraph()
        for node in self.nodes:
            made.add_node(node.id, node=node)
            made.add_edges_from((operand.node, node.id) for operand in node.operands)
        return made

    def __len__(self) -> int:
        return len(self.nodes)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the nodes and outputs only; what is derived from them is made anew."""
        return _restore, (self.nodes, self.outputs, self.name)

    def __repr__(self) -> str:
        return f"Graph({self.name}: {len(self.nodes)} nodes, {len(self.parameters)} parameters)"


def _restore(nodes: tuple[Node, ...], outputs: tuple[tuple[str, Value], ...], name: str) -> Graph:
    return Graph(nodes, outputs, name=name)


def _require_distinct(names: list[str], what: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise GraphError(f"{what} names must be distinct", found=", ".join(repeated))
