"""The JSON form of a graph, with a version; reading it checks everything and runs nothing.

    {"format": "nas-graph", "version": 1, "name": "main",
     "nodes": [{"id": 0, "op": "input", "attributes": {...}, "operands": [], "types": [["float32", [2, 5]]],
                "scope": ""}, ...],
     "outputs": [["y", [0, 0]]]}

A value is `[node, result]`. Attributes are written in full, so that a default may change without changing what old
files mean; numbers that JSON lacks are `{"float": "nan"}`, and constants are base64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, cast

from ir._attributes import MAX_INT, make_op, plain_attributes, tensor_type
from ir.errors import GraphError, ParseError, did_you_mean
from ir.graph import Graph, Node, Value
from ir.op import op_class
from ir.types import TensorType
from ir.verify import verify

FORMAT: Final = "nas-graph"
VERSION: Final = 1
MAX_NODES: Final = 1_000_000

_SPECIAL: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def graph_to_json(graph: Graph) -> str:
    """Write a graph as JSON, a line for each node."""
    head = json.dumps({"format": FORMAT, "version": VERSION, "name": graph.name})
    nodes = ",\n ".join(json.dumps(_node_to_json(node), allow_nan=False) for node in graph.nodes)
    outputs = json.dumps([[name, [value.node, value.index]] for name, value in graph.outputs])
    return f'{head[:-1]},\n"nodes": [\n {nodes}],\n"outputs": {outputs}}}\n'


def graph_from_json(text: str, *, source: str = "graph") -> Graph:
    """Read a graph back from JSON.

    Args:
        text: What `graph_to_json` gave.
        source: What to call the text in errors, such as a file name.

    Raises:
        ParseError: The text is no JSON, another format or version, or holds a malformed graph.
    """
    try:
        data = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded
        )
    except json.JSONDecodeError as error:
        raise ParseError(f"not JSON: {error.msg}", where=f"{source}:{error.lineno}:{error.colno}") from error
    except ValueError as error:
        raise ParseError(f"not JSON: {error}", where=source) from error
    except RecursionError as error:
        raise ParseError("lists or objects are nested too deeply", where=source) from error
    top = _Reader(data, source)
    _check_head(top)
    nodes = [_node_from_json(reader) for reader in top.get("nodes").items(MAX_NODES)]
    outputs = [_output_from_json(reader) for reader in top.get("outputs").items(MAX_NODES)]
    try:
        return verify(Graph(nodes, outputs, name=top.get("name").text()), allow_components=True)
    except GraphError as error:
        where = f"{source}: {error.where}" if error.where else source
        raise ParseError(
            error.message, where=where, expected=error.expected, found=error.found, hint=error.hint
        ) from error


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "op": node.op.name,
        "attributes": {name: _finite_form(value) for name, value in plain_attributes(node.op).items()},
        "operands": [[operand.node, operand.index] for operand in node.operands],
        "types": [[kind.dtype, list(kind.shape)] for kind in node.types],
        "scope": node.scope,
    }


def _finite_form(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite_form(item) for item in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _bounded(text: str) -> int:
    if len(text) > len(str(MAX_INT)):
        raise ValueError(f"{text[:40]} is out of range")
    return int(text)


class _Reader:
    """A piece of parsed JSON that knows its place."""

    def __init__(self, data: Any, where: str) -> None:
        self.data: Any = data
        self.where = where

    def wrong(self, expected: str) -> ParseError:
        shown = json.dumps(self.data)
        found = shown if len(shown) < 80 else shown[:77] + "..."
        return ParseError("wrong value", where=self.where, expected=expected, found=found)

    def mapping(self) -> Mapping[str, Any]:
        data = self.data
        if not isinstance(data, dict):
            raise self.wrong("an object")
        return cast("Mapping[str, Any]", data)

    def only(self, *keys: str) -> None:
        for key in self.mapping():
            if key not in keys:
                hint = did_you_mean(key, keys)
                raise ParseError(f"unknown key '{key}'", where=self.where, expected=", ".join(keys), hint=hint)

    def get(self, key: str) -> _Reader:
        if key not in self.mapping():
            raise ParseError(f"key '{key}' is missing", where=self.where)
        return _Reader(self.mapping()[key], f"{self.where}.{key}")

    def items(self, limit: int) -> list[_Reader]:
        data = self.data
        if not isinstance(data, list):
            raise self.wrong("a list")
        items = cast("list[Any]", data)
        if len(items) > limit:
            raise ParseError("list is too long", where=self.where, expected=f"at most {limit}", found=str(len(items)))
        return [_Reader(item, f"{self.where}[{index}]") for index, item in enumerate(items)]

    def pair(self) -> tuple[_Reader, _Reader]:
        items = self.items(MAX_NODES)
        if len(items) != 2:
            raise self.wrong("a list of two")
        return items[0], items[1]

    def text(self) -> str:
        if not isinstance(self.data, str):
            raise self.wrong("text")
        return self.data

    def integer(self) -> int:
        if type(self.data) is not int or not 0 <= self.data < MAX_INT:
            raise self.wrong("a whole number")
        return self.data


def _check_head(top: _Reader) -> None:
    if top.get("format").text() != FORMAT:
        found = repr(top.get("format").text())
        raise ParseError("not a graph", where=top.where, expected=f"format {FORMAT}", found=found)
    if top.get("version").integer() != VERSION:
        raise ParseError(
            "graph of another version",
            where=top.where,
            expected=f"version {VERSION}",
            found=f"version {top.get('version').data}",
            hint="write it again with this release, or read it with the one that wrote it",
        )
    top.only("format", "version", "name", "nodes", "outputs")


def _node_from_json(reader: _Reader) -> Node:
    reader.only("id", "op", "attributes", "operands", "types", "scope")
    name = reader.get("op")
    try:
        kind = op_class(name.text())
    except GraphError as error:
        raise ParseError(error.message, where=name.where, hint=error.hint) from error
    attributes = reader.get("attributes")
    values = {key: _special_form(value, attributes.where) for key, value in attributes.mapping().items()}
    return Node(
        reader.get("id").integer(),
        make_op(kind, values, attributes.where),
        tuple(_value_from_json(operand) for operand in reader.get("operands").items(MAX_NODES)),
        tuple(_type_from_json(result) for result in reader.get("types").items(MAX_NODES)),
        reader.get("scope").text(),
    )


def _special_form(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_special_form(item, where) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, Any]", value)
    if list(entries) != ["float"] or not isinstance(entries["float"], str) or entries["float"] not in _SPECIAL:
        raise ParseError("wrong value", where=where, expected=f'{{"float": one of {", ".join(_SPECIAL)}}}')
    return _SPECIAL[entries["float"]]


def _output_from_json(reader: _Reader) -> tuple[str, Value]:
    name, value = reader.pair()
    return name.text(), _value_from_json(value)


def _value_from_json(reader: _Reader) -> Value:
    node, index = reader.pair()
    return Value(node.integer(), index.integer())


def _type_from_json(reader: _Reader) -> TensorType:
    dtype, sizes = reader.pair()
    return tensor_type(dtype.text(), [size.integer() for size in sizes.items(MAX_NODES)], sizes.where)
