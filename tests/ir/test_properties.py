"""Properties that hold for every graph."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.errors import ParseError
from ir.graph import Graph, Node, Value
from ir.hashing import canonical_hash
from ir.ops.elementwise import Exp, Neg
from ir.ops.structure import Input, Parameter
from ir.passes.base import Pass, Pipeline
from ir.passes.canonicalize import Canonicalize
from ir.passes.cse import Cse
from ir.passes.dce import Dce
from ir.passes.fold_constants import FoldConstants
from ir.serialize import graph_from_json, graph_to_json
from ir.text import parse_graph, print_graph
from ir.verify import verify
from tests.ir.random_graphs import draw_values, graphs, reorder, run

# Passes reorder no rounding, but numpy may sum the blocks of a matrix product in another order once an operand is
# transposed by a flag: a few units in the last place of float64.
RTOL = 1e-12

PASSES = (Canonicalize(), FoldConstants(allow_rounding=False), Cse(), Dce())


def assert_same(first: Graph, second: Graph) -> None:
    assert (first.name, first.nodes, first.outputs) == (second.name, second.nodes, second.outputs)


@given(graphs())
def test_graph_verifies(graph: Graph):
    """What the builder makes keeps every rule."""
    assert verify(graph) is graph


@given(graphs())
def test_text_round_trips(graph: Graph):
    """Printing and parsing gives the same graph, and the same text again."""
    text = print_graph(graph)
    back = parse_graph(text)
    assert_same(back, graph)
    assert print_graph(back) == text


@given(graphs())
def test_json_round_trips(graph: Graph):
    """Writing and reading JSON gives the same graph, and the same JSON again."""
    text = graph_to_json(graph)
    back = graph_from_json(text)
    assert_same(back, graph)
    assert graph_to_json(back) == text


def renamed(graph: Graph) -> Graph:
    """The same graph with other names, scopes, hints and initial distributions."""
    nodes: list[Node] = []
    for node in graph.nodes:
        op = node.op
        if isinstance(op, Input):
            op = dataclasses.replace(op, label=f"z{op.label}")
        elif isinstance(op, Parameter):
            op = dataclasses.replace(op, label=f"a.b{op.label}", init="normal(0.25)")
        elif "chunk" in op.hints:
            op = dataclasses.replace(op, chunk=7, form="recurrent")
        nodes.append(Node(node.id, op, node.operands, node.types, "elsewhere"))
    return Graph(nodes, [(f"other_{name}", value) for name, value in graph.outputs], name="other")


@given(graphs(), st.integers(0, 2**32 - 1))
def test_hash_ignores_names_order_and_dead_nodes(graph: Graph, seed: int):
    """Renaming, another topological order and a dead node leave the hash as it is."""
    expected = canonical_hash(graph)
    assert canonical_hash(renamed(graph)) == expected
    assert canonical_hash(reorder(graph, np.random.default_rng(seed))) == expected
    last = graph.nodes[-1].id
    dead = Node(last + 1, Neg(), (graph.outputs[0][1],), (graph.type_of(graph.outputs[0][1]),))
    assert canonical_hash(Graph([*graph.nodes, dead], graph.outputs)) == expected


@given(graphs())
def test_hash_ignores_the_order_of_commutative_operands(graph: Graph):
    """Exchanging the operands of every commutative operation leaves the hash as it is."""
    nodes = [dataclasses.replace(n, operands=n.operands[::-1]) if n.op.commutative else n for n in graph.nodes]
    assert canonical_hash(Graph(nodes, graph.outputs)) == canonical_hash(graph)


@given(graphs())
def test_hash_differs_for_another_result(graph: Graph):
    """The exponential of the first output in its place changes the hash."""
    name, value = graph.outputs[0]
    last = graph.nodes[-1].id
    extra = Node(last + 1, Exp(), (value,), (graph.type_of(value),))
    changed = Graph([*graph.nodes, extra], [(name, Value(last + 1)), *graph.outputs[1:]])
    assert canonical_hash(changed) != canonical_hash(graph)


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
@given(graph=graphs())
def test_pass_preserves_the_result(step: Pass, graph: Graph):
    """A pass leaves what the graph computes as it is, keeps its signature, and running it again changes nothing."""
    changed = step(graph)
    assert changed.inputs.keys() == graph.inputs.keys()
    assert set(changed.parameters) <= set(graph.parameters)
    inputs, params = draw_values(graph)
    expected, found = run(graph, inputs, params), run(changed, inputs, params)
    assert list(found) == list(expected)
    for name, array in expected.items():
        scale = float(np.max(np.abs(array), initial=1.0, where=np.isfinite(array)))
        np.testing.assert_allclose(found[name], array, rtol=RTOL, atol=RTOL * scale)
    again = step(changed)
    assert (again.nodes, again.outputs) == (changed.nodes, changed.outputs)


@given(graphs())
def test_passes_preserve_the_hash(graph: Graph):
    """Passes that fold no constants leave the hash as it is."""
    steps = Pipeline((Cse(), Canonicalize(), Dce()))
    assert canonical_hash(steps(graph)) == canonical_hash(graph)


@given(graphs(max_steps=3), st.data())
def test_text_mutations_give_parse_errors_only(graph: Graph, data: st.DataObject):
    """Text with a few characters exchanged parses or is refused with a ParseError, never anything else."""
    text = print_graph(graph)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 4)))
        extra = data.draw(st.text(st.sampled_from('0159-.%"[]{}()=:,@ \nxeinfa'), max_size=4))
        text = text[:start] + extra + text[stop:]
    try:
        graph = parse_graph(text)
    except ParseError:
        return
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.sampled_from([2**31, 2**63, -(10**30), 1e308, 0.5]),
    st.sampled_from(["", "add", "float32", "AAAA", "\ud800", "nan", "layers..0"]),
    st.sampled_from([[], {}, [[]], [0, 0], [[0, 0]], ["float32", [2, 2]], {"float": "nan"}, {"float": 1}]),
)


def mutate(node: object, data: st.DataObject) -> object:
    """The JSON value with one place inside it exchanged."""
    if isinstance(node, dict | list) and node and data.draw(st.integers(0, 9)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
        copy = node.copy()
        copy[key] = mutate(node[key], data)
        if data.draw(st.integers(0, 9)) == 0:
            del copy[key]
        return copy
    return data.draw(JUNK)


@given(graphs(max_steps=3), st.data())
def test_json_mutations_give_parse_errors_only(graph: Graph, data: st.DataObject):
    """JSON with a few places exchanged reads or is refused with a ParseError, never anything else."""
    document: object = json.loads(graph_to_json(graph))
    for _ in range(data.draw(st.integers(1, 3))):
        document = mutate(document, data)
    try:
        back = graph_from_json(json.dumps(document))
    except ParseError:
        return
    graph_to_json(back)
    print_graph(back)


@given(st.text(max_size=200))
def test_text_of_any_kind_gives_parse_errors_only(text: str):
    """Arbitrary text is refused with a ParseError by both readers."""
    with pytest.raises(ParseError):
        parse_graph(text)
    with pytest.raises(ParseError):
        graph_from_json(text)
