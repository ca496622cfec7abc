"""The text form: how it looks, what it keeps, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ir.builder import Builder
from ir.errors import ParseError
from ir.graph import Graph, Node, Value
from ir.ops.attention import Attention
from ir.ops.shape import Pad
from ir.ops.structure import Component, Constant, Input
from ir.text import parse_graph, print_graph
from ir.types import TensorType
from tests.ir.models import decoder, recurrence

Golden = Callable[[str, str], None]


def test_text_of_a_decoder_reads_well(golden: Golden):
    """A language model with parameters, scopes and attributes prints as in the golden file."""
    golden("ir/decoder.txt", print_graph(decoder(layers=1)))


def test_text_of_a_step_reads_well(golden: Golden):
    """Several results, scalars, literal and base64 constants print as in the golden file."""
    golden("ir/recurrence.txt", print_graph(recurrence()))


def round_trip(graph: Graph) -> Graph:
    back = parse_graph(print_graph(graph))
    assert (back.name, back.nodes, back.outputs) == (graph.name, graph.nodes, graph.outputs)
    return back


@pytest.mark.parametrize("make", [decoder, recurrence], ids=["decoder", "recurrence"])
def test_text_round_trips(make: Callable[[], Graph]):
    """What is printed parses to the same graph."""
    round_trip(make())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_text_keeps_special_floats_exactly(dtype: str):
    """Signed zeros, infinities, NaNs, subnormals and awkward fractions keep every bit."""
    numbers = np.array([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-7, 0.1, 1 / 3, 65504.0])
    stored = numbers.astype(np.float16 if dtype == "float16" else np.float32)
    for data in (stored.tobytes(), (-stored).tobytes()):
        graph = Graph(
            [Node(0, Constant(TensorType((9,), dtype), data), (), (TensorType((9,), dtype),))], [("y", Value(0))]
        )
        back = round_trip(graph).nodes[0].op
        assert isinstance(back, Constant)
        assert back.data == data


def test_text_keeps_special_attributes_exactly():
    """-0.0 differs from the default 0.0, and NaN comes back."""
    b = Builder()
    x = b.input("x", (2,))
    minus_zero, nan = (b.apply(Pad((1,), (0,), value), x) for value in (-0.0, math.nan))
    text = print_graph(b.build(a=minus_zero, b=nan))
    assert "value=-0.0" in text
    assert "value=nan" in text
    assert print_graph(parse_graph(text)) == text


def test_text_keeps_odd_names_and_options():
    """Names with blanks, quotes and letters beyond ASCII, and component options of every type, come back."""
    options = (
        ("a", True),
        ("b", 1),
        ("c", 1.0),
        ("d", 'say "ja"\n'),
        ("e", None),
        ("f", (1, (2.5, "x"))),
        ("g h", -math.inf),
    )
    kind = TensorType((2, 3))
    nodes = [
        Node(3, Input('größe of "x"', kind), (), (kind,), "a.0"),
        Node(
            7, Component("token_mixer", "mamba", options, (kind, kind)), (Value(3),), (kind, kind), "layers.0.mixer-b"
        ),
    ]
    round_trip(Graph(nodes, [("return", Value(7, 1)), ("two words", Value(7, 0))], name="graph of 1"))


def test_text_leaves_out_defaults():
    """Attributes with their default value are not printed; an int where a float belongs is the same attribute."""
    b = Builder()
    q = b.input("q", (1, 2, 1, 2))
    text = print_graph(b.build(y=b.apply(Attention(1), q, q, q)))
    assert "attention %0, %0, %0 {scale=1.0} : float32[1, 2, 1, 2]" in text


def test_text_allows_comments_and_any_layout():
    """Comments and line ends are blanks."""
    text = 'graph g{%0=input "x":float32[2] # the input\n\n%1=neg %0:float32[ 2 ] return y=%1}'
    assert print_graph(parse_graph(text)) == (
        'graph g {\n  %0 = input "x" : float32[2]\n  %1 = neg %0 : float32[2]\n  return y=%1\n}\n'
    )


HEAD = 'graph g {\n  %0 = input "x" : float32[2, 3]\n  '

REFUSED = {
    "not_a_graph": "digraph g {}",
    "unknown_operation": HEAD + "%1 = sofmax %0 : float32[2, 3]\n  return y=%1\n}",
    "unknown_attribute": HEAD + "%1 = softmax %0 {axes=1} : float32[2, 3]\n  return y=%1\n}",
    "missing_attribute": HEAD + "%1 = cumsum %0 : float32[2, 3]\n  return y=%1\n}",
    "wrong_attribute_type": HEAD + "%1 = softmax %0 {axis=true} : float32[2, 3]\n  return y=%1\n}",
    "attribute_twice": HEAD + "%1 = softmax %0 {axis=1, axis=1} : float32[2, 3]\n  return y=%1\n}",
    "wrong_type": HEAD + "%1 = neg %0 : float32[2, 4]\n  return y=%1\n}",
    "broken_shape_rule": HEAD + "%1 = matmul %0, %0 : float32[2, 2]\n  return y=%1\n}",
    "unknown_operand": HEAD + "%1 = neg %7 : float32[2, 3]\n  return y=%1\n}",
    "unknown_result": HEAD + "%1 = neg %0.1 : float32[2, 3]\n  return y=%1\n}",
    "numbers_fall": HEAD + "%0 = neg %0 : float32[2, 3]\n  return y=%0\n}",
    "too_many_results": HEAD + "%1.0, %1.1 = neg %0 : float32[2, 3]\n  return y=%0\n}",
    "unknown_dtype": HEAD + '%1 = cast %0 {dtype="float64"} : float64[2, 3]\n  return y=%1\n}',
    "gigantic_size": 'graph g {\n  %0 = input "x" : float32[99999999, 99999999, 99999999]\n  return y=%0\n}',
    "gigantic_number": 'graph g {\n  %0 = input "x" : float32[' + "9" * 5000 + "]\n  return y=%0\n}",
    "short_constant": "graph g {\n  %0 = constant [1.0, 2.0] : float32[3]\n  return y=%0\n}",
    "constant_of_words": "graph g {\n  %0 = constant [true, 2.0] : float32[2]\n  return y=%0\n}",
    "constant_overflow": "graph g {\n  %0 = constant 3000000000 : int32[]\n  return y=%0\n}",
    "bad_base64": 'graph g {\n  %0 = constant base64"AAA" : float32[]\n  return y=%0\n}',
    "bad_init": 'graph g {\n  %0 = parameter "w" (d=2) init="normal" \n  return y=%0\n}',
    "bad_axis": 'graph g {\n  %0 = parameter "w" (d=0) init="fan_in"\n  return y=%0\n}',
    "parameter_twice": 'graph g {\n%0 = parameter "w" init="fan_in"\n%1 = parameter "w" init="fan_in"\nreturn y=%0\n}',
    "bad_scope": HEAD + '%1 = neg %0 : float32[2, 3] @ "a..b"\n  return y=%1\n}',
    "no_output": HEAD + "return\n}",
    "output_twice": HEAD + "return y=%0, y=%0\n}",
    "truncated": HEAD + "%1 = neg %0 : float32[2,",
    "more_text": HEAD + "return y=%0\n}\ngraph h {",
    "stray_character": HEAD + "%1 = neg %0 ; float32[2, 3]\n  return y=%1\n}",
    "deep_list": HEAD + "%1 = softmax %0 {axis=" + "[" * 5000 + "} : float32[2, 3]",
}


def test_text_errors_read_well(golden: Golden):
    """Each malformed text gives one error with line, column, what was expected and what was found."""
    messages: list[str] = []
    for name, text in REFUSED.items():
        with pytest.raises(ParseError) as caught:
            parse_graph(text, source="g.txt")
        messages.append(f"== {name}\n{caught.value}")
    golden("ir/text_errors.txt", "\n".join(messages))
