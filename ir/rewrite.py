"""Rewrite a graph node by node, in order.

A rule sees one node whose operands are already rewritten. It returns the values that take the place of the node's
results, adding nodes as it likes through the rewriter, or None to leave the node as it is:

    def double_negation(r: Rewriter, node: Node) -> Replacement:
        inner = r.producer(node.operands[0])
        return inner.operands[0] if isinstance(inner.op, Neg) else None

    graph = rewrite(graph, {Neg: [double_negation]})
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops.structure import Input
from ir.types import TensorType

Replacement = Value | Sequence[Value] | None
Rule = Callable[["Rewriter", Node], Replacement]
Rules = Mapping[type[Op], Sequence[Rule]]
Visit = Callable[["Rewriter", Node], Sequence[Value]]


@dataclass
class Rewriter:
    """The graph being made. Added nodes stand in the scope of the node that is being replaced.

    Attributes:
        rules: Tried on every node, by its operation, also on nodes that rules add.
        scope: Scope of the nodes added next.
    """

    rules: Rules = field(default_factory=dict[type[Op], Sequence[Rule]])
    scope: str = ""
    _nodes: list[Node] = field(default_factory=list[Node])

    def producer(self, value: Value) -> Node:
        """The new node that makes a value."""
        return self._nodes[value.node]

    def type_of(self, value: Value) -> TensorType:
        """Type of a new value."""
        return self._nodes[value.node].types[value.index]

    def emit(self, op: Op, *operands: Value) -> Value:
        """Add a node with one result.

        Raises:
            GraphError: The operands do not fit, or the operation has several results.
        """
        results = self.emit_all(op, *operands)
        if len(results) != 1:
            raise GraphError("the operation has several results; use emit_all", where=op.name)
        return results[0]

    def emit_all(self, op: Op, *operands: Value) -> Sequence[Value]:
        """Add a node, or what the rules make of it, and return its results.

        Raises:
            GraphError: The operands do not fit the operation.
        """
        types = op.infer_types(tuple(self.type_of(operand) for operand in operands))
        return self.add(Node(len(self._nodes), op, operands, types, self.scope))

    def add(self, node: Node) -> Sequence[Value]:
        """Add a node whose operands are new values, after trying the rules on it; its number is given anew.

        Raises:
            GraphError: A rule returns values of other types than the node's results.
        """
        for rule in self.rules.get(type(node.op), ()):
            replacement = rule(self, node)
            if replacement is not None:
                return self._checked(node, replacement, rule)
        if node.id != len(self._nodes):
            node = Node(len(self._nodes), node.op, node.operands, node.types, node.scope)
        self._nodes.append(node)
        return node.results

    def _checked(self, node: Node, replacement: Value | Sequence[Value], rule: Rule) -> Sequence[Value]:
        values = (replacement,) if isinstance(replacement, Value) else tuple(replacement)
        types = tuple(self.type_of(value) for value in values)
        if types != node.types:
            name = getattr(rule, "__name__", "a rule")
            raise GraphError(
                f"{name} changes the type of what it replaces",
                where=node.path,
                expected=", ".join(map(str, node.types)),
                found=", ".join(map(str, types)),
            )
        return values

    def holds(self, graph: Graph) -> bool:
        """Whether the nodes made are those of a graph, and in their places."""
        return len(self._nodes) == len(graph.nodes) and all(map(operator.is_, self._nodes, graph.nodes))

    def finish(self, outputs: Sequence[tuple[str, Value]], name: str) -> Graph:
        """The new graph without dead nodes, densely numbered; inputs stay, being part of the signature."""
        return keep_live(Graph(self._nodes, outputs, name=name))


def rebuild(graph: Graph, visit: Visit, rules: Rules | None = None) -> Graph:
    """Make a graph anew: `visit` gets each node with rewritten operands and returns the values of its results.

    Where all nodes stay as they are, so does the graph: it is returned itself.
    """
    rewriter = Rewriter(rules or {})
    values: dict[Value, Value] = {}
    for node in graph.nodes:
        rewriter.scope = node.scope
        operands = tuple(values[operand] for operand in node.operands)
        moved = operands != node.operands
        results = visit(rewriter, Node(node.id, node.op, operands, node.types, node.scope) if moved else node)
        values.update(zip(node.results, results, strict=True))
    outputs = [(name, values[value]) for name, value in graph.outputs]
    unchanged = outputs == list(graph.outputs) and rewriter.holds(graph)
    return keep_live(graph) if unchanged else rewriter.finish(outputs, graph.name)


def rewrite(graph: Graph, rules: Rules) -> Graph:
    """Apply rules to every node, first to last. Operands are rewritten before the nodes that read them."""
    return rebuild(graph, lambda rewriter, node: rewriter.add(node), rules)


def keep_live(graph: Graph) -> Graph:
    """Drop the nodes that no output depends on, inputs excepted, and number the rest densely in the same order."""
    kept = [node for node in graph.nodes if node.id in graph.live or isinstance(node.op, Input)]
    number = {node.id: index for index, node in enumerate(kept)}
    if all(old == new for old, new in number.items()) and len(kept) == len(graph.nodes):
        return graph

    def moved(value: Value) -> Value:
        return Value(number[value.node], value.index)

    nodes = [Node(number[node.id], node.op, tuple(map(moved, node.operands)), node.types, node.scope) for node in kept]
    return Graph(nodes, [(name, moved(value)) for name, value in graph.outputs], name=graph.name)


def inline(rewriter: Rewriter, body: Graph, operands: Sequence[Value], visit: Visit) -> Sequence[Value]:
    """Add the nodes of another graph, visiting each in turn.

    Args:
        rewriter: Where they go.
        body: The graph.
        operands: What takes the place of its inputs, in order.
        visit: As for `rebuild`.

    Returns:
        The values of its outputs, in order.
    """
    given = iter(operands)
    values: dict[Value, Value] = {}
    for node in body.nodes:
        if isinstance(node.op, Input):
            values[node.results[0]] = next(given)
            continue
        inside = Node(node.id, node.op, tuple(values[operand] for operand in node.operands), node.types, node.scope)
        rewriter.scope = node.scope
        values.update(zip(node.results, visit(rewriter, inside), strict=True))
    return tuple(values[value] for _, value in body.outputs)
