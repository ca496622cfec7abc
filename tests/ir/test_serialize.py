"""The JSON form: what it looks like, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from ir.builder import Builder
from ir.errors import ParseError
from ir.ops.shape import Pad
from ir.serialize import graph_from_json, graph_to_json
from ir.text import print_graph
from tests.ir.models import decoder, recurrence

Golden = Callable[[str, str], None]


def test_json_format_version_1(golden: Golden):
    """The first version of the format is written as in the golden file."""
    golden("ir/recurrence.json", graph_to_json(recurrence()))


def test_json_is_standard():
    """NaN and infinities are written in a way that every JSON reader accepts, and come back."""
    b = Builder()
    graph = b.build(y=b.apply(Pad((1,), (0,), -math.inf), b.input("x", (2,))))

    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = graph_to_json(graph)
    json.loads(text, parse_constant=refuse)
    assert graph_from_json(text).nodes == graph.nodes


def test_json_and_text_hold_the_same():
    """A graph read from JSON prints as it did before."""
    graph = decoder()
    assert print_graph(graph_from_json(graph_to_json(graph))) == print_graph(graph)


def change(path: str, value: Any) -> str:
    """The recurrence's JSON with the value at a dotted path exchanged, or deleted where it is `...`."""
    document = json.loads(graph_to_json(recurrence()))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


REFUSED: dict[str, Callable[[], str]] = {
    "not_json": lambda: "{",
    "not_an_object": lambda: "[]",
    "nan_literal": lambda: '{"format": NaN}',
    "out_of_range_float": lambda: '{"format": 1e999}',
    "many_digits": lambda: "1" * 5000,
    "deep_nesting": lambda: "[" * 100_000,
    "key_twice": lambda: '{"format": "nas-graph", "format": "nas-graph"}',
    "other_format": lambda: change("format", "onnx"),
    "other_version": lambda: change("version", 2),
    "version_is_text": lambda: change("version", "1"),
    "unknown_key": lambda: change("notes", "hello"),
    "missing_nodes": lambda: change("nodes", ...),
    "unknown_operation": lambda: change("nodes.4.op", "brodcast"),
    "unknown_attribute": lambda: change("nodes.4.attributes.shap", [1]),
    "missing_attribute": lambda: change("nodes.4.attributes.shape", ...),
    "wrong_attribute": lambda: change("nodes.4.attributes.shape", [1, "1", 2]),
    "unknown_choice": lambda: change("nodes.5.attributes.decay", "heads"),
    "number_too_large": lambda: change("nodes.4.attributes.shape", [10**30]),
    "special_float": lambda: change("nodes.5.attributes.scale", {"float": "huge"}),
    "operand_missing": lambda: change("nodes.4.operands", []),
    "operand_later": lambda: change("nodes.4.operands.0", [7, 0]),
    "operand_negative": lambda: change("nodes.4.operands.0", [-1, 0]),
    "wrong_type": lambda: change("nodes.4.types.0", ["float32", [1, 1, 3]]),
    "zero_size": lambda: change("nodes.4.types.0", ["float32", [1, 0, 2]]),
    "unknown_dtype": lambda: change("nodes.4.types.0", ["float64", [1, 1, 2]]),
    "bad_base64": lambda: change("nodes.6.attributes.data", "A?=="),
    "short_constant": lambda: change("nodes.6.attributes.data", "AAAA"),
    "id_twice": lambda: change("nodes.4.id", 3),
    "bad_scope": lambda: change("nodes.4.scope", "a b"),
    "code_as_init": lambda: change("nodes.3.attributes.init", "__import__('os')"),
    "no_outputs": lambda: change("outputs", []),
    "output_unknown": lambda: change("outputs.0", ["y", [99, 0]]),
}


def test_json_errors_read_well(golden: Golden):
    """Each malformed document gives one error that says where, what was expected and what was found."""
    messages: list[str] = []
    for name, make in REFUSED.items():
        with pytest.raises(ParseError) as caught:
            graph_from_json(make(), source="g.json")
        messages.append(f"== {name}\n{caught.value}")
    golden("ir/json_errors.txt", "\n".join(messages))
