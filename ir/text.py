"""The text form of a graph: it prints, and what it prints parses back to the same graph.

    graph main {
      %0 = input "x" : float32[2, 5, 8]
      %1 = parameter "mixer.q" (d_model=8) (heads=2, head_dim=4) init="fan_in" @ mixer
      %2 = matmul %0, %1 : float32[2, 5, 8] @ mixer
      %3 = constant [0.5, -1.0] : float32[2]
      %4.0, %4.1 = outer_scan %5, %6, %7 {scale=0.5} : float32[2, 5, 2, 4], float32[2, 2, 4, 4] @ mixer
      return y=%2
    }

`%4` is the number of the node, as in error messages, and is kept; `%4.1` is its second result. Attributes with their
default value are left out. Floats are written so that they read back exactly, small constants as numbers and larger
ones as base64; the body of a loop is a graph inside, numbered by itself. What follows `@` is the scope. Blanks and line
ends separate words; `#` starts a comment.
"""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np

from ir._attributes import attribute_defaults, attribute_hints, conform, normal_attributes, plain
from ir._lexer import WORD
from ir._parser import Parser, array_of
from ir.graph import Graph, Node, Value
from ir.ops.control import Body
from ir.ops.structure import Component, Constant, Input, Parameter

LITERAL_ELEMENTS: Final = 16
"""Constants with more elements are written as base64."""


def parse_graph(text: str, *, source: str = "graph") -> Graph:
    """Read a graph back from its text form.

    Args:
        text: What `print_graph` gave, or the like.
        source: What to call the text in errors, such as a file name.

    Raises:
        ParseError: The text is malformed or holds a malformed graph; the message gives line and column.
    """
    return Parser(text, source).graph()


def print_graph(graph: Graph) -> str:
    """Write a graph as text, a line for each node."""
    outputs = ", ".join(f"{_name(name)}={_value(graph, value)}" for name, value in graph.outputs)
    lines = [f"graph {_name(graph.name)} {{", *(f"  {print_node(graph, node)}" for node in graph.nodes)]
    return "\n".join([*lines, f"  return {outputs}", "}", ""])


def print_node(graph: Graph, node: Node) -> str:
    """Write one node, without indent."""
    results = ", ".join(_value(graph, value) for value in node.results)
    scope = f" @ {_name(node.scope)}" if node.scope else ""
    return f"{results} = {_body(graph, node)}{scope}"


def _body(graph: Graph, node: Node) -> str:
    operands = ", ".join(_value(graph, operand) for operand in node.operands)
    types = ", ".join(map(str, node.types))
    match node.op:
        case Input(label=label):
            return f"input {_quoted(label)} : {types}"
        case Parameter() as op:
            return _parameter(op)
        case Constant() as op:
            return f"constant {_constant(op)} : {types}"
        case Component() as op:
            call = f"component {_quoted(op.kind)} {_quoted(op.key)}"
            return _joined(call, operands, _braces(dict(op.options))) + f" : {types}"
        case op:
            return _joined(op.name, operands, _braces(_changed(node))) + f" : {types}"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _parameter(op: Parameter) -> str:
    dimensions = ["(" + ", ".join(f"{_name(axis.name)}={axis.size}" for axis in factors) + ")" for factors in op.axes]
    return _joined(
        "parameter", _quoted(op.label), *dimensions, f"init={_quoted(op.init)}", "" if op.trained else "fixed"
    )


def _changed(node: Node) -> dict[str, Any]:
    """Attributes that differ from their defaults; compared as text, where 0.0 and -0.0 differ."""
    kind = type(node.op)
    hints, defaults = attribute_hints(kind), attribute_defaults(kind)
    usual = {name: repr(conform(hints[name], default, name)) for name, default in defaults.items()}
    return {name: value for name, value in normal_attributes(node.op).items() if usual.get(name) != repr(value)}


def _braces(attributes: dict[str, Any]) -> str:
    if not attributes:
        return ""
    return "{" + ", ".join(f"{_name(name)}={_attribute(value)}" for name, value in attributes.items()) + "}"


def _attribute(value: Any) -> str:
    return textwrap.indent(str(value), "  ").strip() if isinstance(value, Body) else _literal(plain(value))


def _literal(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "none", True: "true", False: "false"}[value]
        case str():
            return _quoted(value)
        case list():
            return "[" + ", ".join(_literal(item) for item in cast("list[Any]", value)) + "]"
        case _:
            return repr(value)


def _constant(op: Constant) -> str:
    """Numbers if there are few and they read back to the same bytes, else base64."""
    if op.type.size <= LITERAL_ELEMENTS:
        text, numbers = _numbers(op)
        if array_of(numbers, op.type).tobytes() == op.data:
            return text
    return f'base64"{base64.b64encode(op.data).decode()}"'


def _numbers(op: Constant) -> tuple[str, Any]:
    array = op.evaluate()
    if op.type.dtype == "bool":
        words: list[str] = ["true" if item else "false" for item in np.ravel(array)]
        numbers: list[Any] = [bool(item) for item in np.ravel(array)]
    else:
        words = [str(item) for item in np.ravel(array)]
        numbers = [float(word) if array.dtype.kind == "f" else int(word) for word in words]
    return _nested(words, op.type.shape), numbers


def _nested(words: Sequence[str], shape: Sequence[int]) -> str:
    if not shape:
        return words[0]
    size = len(words) // shape[0]
    rows = [_nested(words[index * size : (index + 1) * size], shape[1:]) for index in range(shape[0])]
    return "[" + ", ".join(rows) + "]"


def _value(graph: Graph, value: Value) -> str:
    return f"%{value.node}" if len(graph.node(value.node).types) == 1 else f"%{value.node}.{value.index}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _name(text: str) -> str:
    return text if WORD.fullmatch(text) else _quoted(text)
