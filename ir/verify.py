"""Check that a graph keeps every rule of the intermediate representation."""

from __future__ import annotations

import re
from typing import Final
from weakref import WeakSet

from ir._attributes import normal_attributes
from ir.errors import GraphError, ParseError
from ir.graph import Graph, Node
from ir.initializers import parse as parse_initializer
from ir.ops.control import Loop
from ir.ops.structure import Component, Parameter

SCOPE: Final = re.compile(r"(?:[^.\s]+(?:\.[^.\s]+)*)?")
"""A path of names joined by dots, or nothing."""

_VERIFIED: Final[WeakSet[Graph]] = WeakSet()
"""Graphs without components that were found right; they never change."""


def verify(graph: Graph, *, allow_components: bool = False) -> Graph:
    """Check types, attributes, order, scopes and parameters of every node, dead ones too.

    Args:
        graph: What to check.
        allow_components: Whether component nodes may still be there.

    Returns:
        The same graph, so that calls chain.

    Raises:
        GraphError: A rule is broken; the message names the node by its path.
    """
    if graph in _VERIFIED:
        return graph
    for node in graph.nodes:
        _verify_order(node)
        _verify_attributes(node)
        _verify_types(graph, node)
        if SCOPE.fullmatch(node.scope) is None:
            raise GraphError(
                "a scope is names joined by dots, without blanks", where=node.op.name, found=repr(node.scope)
            )
        if isinstance(node.op, Component) and not allow_components:
            hint = "run expand_components first"
            raise GraphError("a component stands where operations are needed", where=node.path, hint=hint)
        if isinstance(node.op, Parameter):
            _verify_parameter(node.op, node.path)
        if isinstance(node.op, Loop):
            _verify_body(node.op, node.path)
    if not any(isinstance(node.op, Component) for node in graph.nodes):
        _VERIFIED.add(graph)
    return graph


def _verify_body(loop: Loop, where: str) -> None:
    try:
        body = verify(loop.body.graph)
    except GraphError as error:
        inside = f"{where}, {error.where}" if error.where else where
        raise GraphError(error.message, where=inside, expected=error.expected, found=error.found) from error
    if body.parameters:
        found = ", ".join(body.parameters)
        raise GraphError(
            "the body of a loop has parameters", where=where, expected="inputs in their place", found=found
        )


def _verify_order(node: Node) -> None:
    for operand in node.operands:
        if operand.node >= node.id:
            raise GraphError(
                "an operand does not come from a smaller number",
                where=node.path,
                expected=f"below %{node.id}",
                found=f"%{operand.node}",
            )


def _verify_attributes(node: Node) -> None:
    try:
        normal_attributes(node.op)
    except ParseError as error:
        where = f"{node.path}, attribute {error.where}"
        raise GraphError(error.message, where=where, expected=error.expected, found=error.found) from error


def _verify_types(graph: Graph, node: Node) -> None:
    try:
        inferred = node.op.infer_types(graph.operand_types(node))
    except GraphError as error:
        raise GraphError(error.message, where=node.path, expected=error.expected, found=error.found) from error
    if inferred != node.types:
        raise GraphError(
            "types are not what the operation gives",
            where=node.path,
            expected=", ".join(map(str, inferred)),
            found=", ".join(map(str, node.types)),
        )


def _verify_parameter(parameter: Parameter, where: str) -> None:
    if SCOPE.fullmatch(parameter.label) is None or not parameter.label:
        raise GraphError("a parameter needs a name without blanks", where=where, found=repr(parameter.label))
    parse_initializer(parameter.init, where=where)
