"""A hash equal for graphs that compute the same function in the same way.

Ignored: node numbers and order, dead nodes, scopes, hints, initial distributions, and all names: of the graph, inputs,
parameters and outputs. Outputs count by their order. Which operand of a commutative operation comes first does not
matter, nor whether a repeated expression is one node or two, nor anything that `Canonicalize` removes.

Parameters and inputs are told apart by their uses: two parameters of equal axes are two objects, so a tied and an
untied embedding differ. Each gets a colour from its axes (an input: its type) and from the places that read it; colours
are refined until no more of them part (Weisfeiler and Leman 1968). Of those that stay equal, which as a rule can be
exchanged without changing the graph, one is singled out and the others are refined again, until all are told apart.
A component node holds parameters, so it is treated likewise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ir._attributes import op_key
from ir.graph import Graph, Node, Value
from ir.ops.structure import Component, Input, Parameter
from ir.passes.canonicalize import Canonicalize
from ir.passes.cse import Cse

VERSION: Final = 1
"""Part of every hash; raised when the hash of some graph changes."""

Colours = dict[int, bytes]
"""A colour for each node number."""


def canonical_hash(graph: Graph) -> str:
    """Hash the meaning of a graph.

    Args:
        graph: A graph; component nodes are allowed and count by kind, key and options.

    Returns:
        32 hexadecimal digits.
    """
    simple = _simplify(graph)
    nodes = tuple(node for node in simple.nodes if node.id in simple.live)
    hasher = _Hasher(nodes, tuple(value for _, value in simple.outputs), {node.id: _seed(node) for node in nodes})
    colours = hasher.upward(_tell_apart(hasher))
    return _digest(b"%d" % VERSION, *(_result(colours, value) for value in hasher.outputs)).hex()


def ordered_hash(graph: Graph) -> str:
    """Hash the meaning of a graph whose inputs count by their order, such as the body of a loop.

    Args:
        graph: A graph without parameters and components.

    Returns:
        32 hexadecimal digits.
    """
    simple = _simplify(graph)
    order = {node.id: b"input %d" % index for index, node in enumerate(simple.inputs.values())}
    hasher = _Hasher(simple.nodes, tuple(value for _, value in simple.outputs), {n.id: _seed(n) for n in simple.nodes})
    colours = hasher.upward(order)
    return _digest(b"%d" % VERSION, *(_result(colours, value) for value in hasher.outputs)).hex()


def _simplify(graph: Graph) -> Graph:
    """Canonicalize and merge repeated expressions until there are none to merge."""
    graph = Cse().run(graph)
    while True:
        canonical = Canonicalize().run(graph)
        graph = Cse().run(canonical)
        if len(graph) == len(canonical):
            return graph


def _digest(*parts: bytes) -> bytes:
    """A hash of the parts and of where each ends."""
    lengths = b",".join(b"%d" % len(part) for part in parts)
    return hashlib.blake2b(lengths + b":" + b"".join(parts), digest_size=16).digest()


def _seed(node: Node) -> bytes:
    """What a node is by itself: operation, attributes, result types."""
    match node.op:
        case Input():
            text = "input"
        case Parameter(axes=axes):
            text = f"parameter {axes!r}"
        case op:
            text = op_key(op, without=op.hints)
    return _digest(text.encode("utf-8", "backslashreplace"), str(node.types).encode())


def _result(colours: Mapping[int, bytes], value: Value) -> bytes:
    return colours[value.node] + b"%d" % value.index


@dataclass(frozen=True)
class _Hasher:
    """Live nodes in order, output values, and what each node is by itself."""

    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    seeds: Colours

    def upward(self, marks: Mapping[int, bytes]) -> Colours:
        """Colour of each node from its operands' colours and its own mark, if it has one."""
        colours: Colours = {}
        for node in self.nodes:
            operands = [_result(colours, operand) for operand in node.operands]
            ordered = sorted(operands) if node.op.commutative else operands
            colours[node.id] = _digest(self.seeds[node.id], marks.get(node.id, b""), *ordered)
        return colours

    def downward(self, upward: Mapping[int, bytes]) -> Colours:
        """Colour of each node from its upward colour and the places that read it, down from the outputs."""
        uses: dict[int, list[bytes]] = {node.id: [] for node in self.nodes}
        for position, value in enumerate(self.outputs):
            uses[value.node].append(b"output %d %d" % (position, value.index))
        colours: Colours = {}
        for node in reversed(self.nodes):
            colours[node.id] = colour = _digest(upward[node.id], *sorted(uses[node.id]))
            for position, operand in enumerate(node.operands):
                place = 0 if node.op.commutative else position
                uses[operand.node].append(colour + b"%d %d" % (place, operand.index))
        return colours


def _tell_apart(hasher: _Hasher) -> Colours:
    """A mark for each input, parameter and component with which no two of them have the same colour."""
    marks = {n.id: b"" for n in hasher.nodes if isinstance(n.op, Input | Parameter | Component)}
    while True:
        colours = hasher.upward(marks)
        count = len({colours[number] for number in marks})
        if count == len(marks):
            return marks
        colours = hasher.downward(colours)
        members: dict[bytes, list[int]] = {}
        for number in marks:
            members.setdefault(colours[number], []).append(number)
        marks = {number: colours[number] for number in marks}
        if len(members) == count:
            tied = min(colour for colour, numbers in members.items() if len(numbers) > 1)
            marks[members[tied][0]] = _digest(tied, b"first")
