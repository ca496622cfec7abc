"""The verifier: each rule, broken once."""

from __future__ import annotations

import numpy as np
import pytest

from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops.attention import Rope
from ir.ops.contraction import Matmul
from ir.ops.elementwise import Neg
from ir.ops.normalization import Softmax
from ir.ops.structure import Component, Input, Parameter
from ir.types import Axis, TensorType
from ir.verify import verify
from tests.ir.models import decoder, recurrence

KIND = TensorType((2, 3))


def graph_of(op: Op, operands: tuple[Value, ...] = (Value(0),), kind: TensorType = KIND, scope: str = "a.b") -> Graph:
    return Graph([Node(0, Input("x", KIND), (), (KIND,)), Node(5, op, operands, (kind,), scope)], [("y", Value(5))])


def test_verify_returns_a_sound_graph():
    """Sound graphs pass and come back, so that calls chain."""
    for graph in (decoder(), recurrence()):
        assert verify(graph) is graph


REFUSED: dict[str, tuple[Graph, str]] = {
    "type": (graph_of(Neg(), kind=TensorType((3, 2))), "a.b/neg_5: types are not what"),
    "operands": (graph_of(Matmul()), "a.b/matmul_5: matmul: wrong number of operands"),
    "shape_rule": (graph_of(Softmax(7)), "a.b/softmax_5: axis out of range"),
    "attribute_type": (graph_of(Softmax("1")), r"a.b/softmax_5, attribute softmax.axis: wrong value"),  # type: ignore[arg-type]
    "numpy_attribute": (graph_of(Softmax(np.int64(1))), "attribute softmax.axis: wrong value"),  # type: ignore[arg-type]
    "scope": (graph_of(Neg(), scope="a..b"), "a scope is names"),
    "blank_scope": (graph_of(Neg(), scope="a b"), "a scope is names"),
    "component": (graph_of(Component("norm", "rms_norm", (), (KIND,))), "a component stands where"),
    "init": (
        graph_of(Parameter("w", ((Axis("d", 2),), (Axis("e", 3),)), "normal(a)"), ()),
        "an argument is not a number",
    ),
    "no_init": (graph_of(Parameter("w", ((Axis("d", 2),), (Axis("e", 3),)), "normall"), ()), "did you mean 'normal'"),
    "label": (graph_of(Parameter("", ((Axis("d", 2),), (Axis("e", 3),))), ()), "a parameter needs a name"),
    "rope_base": (graph_of(Rope(float("nan"))), "rope needs a positive base"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_verify_names_the_node_and_the_rule(name: str):
    """A broken rule is a GraphError that names the node's path."""
    graph, message = REFUSED[name]
    with pytest.raises(GraphError, match=message):
        verify(graph)


def test_verify_wants_operands_from_smaller_numbers():
    """Nodes in order whose numbers are not are refused."""
    nodes = [Node(9, Input("x", KIND), (), (KIND,)), Node(5, Neg(), (Value(9),), (KIND,))]
    with pytest.raises(GraphError, match="smaller number"):
        verify(Graph(nodes, [("y", Value(5))]))


def test_verify_allows_components_when_told():
    """Before expansion component nodes are in order, and that does not count for later."""
    graph, message = REFUSED["component"]
    assert verify(graph, allow_components=True) is graph
    with pytest.raises(GraphError, match=message):
        verify(graph)


STRUCTURE: dict[str, tuple[list[Node], list[tuple[str, Value]], str]] = {
    "unknown_operand": ([Node(0, Neg(), (Value(3),), (KIND,))], [("y", Value(0))], "not an earlier node"),
    "unknown_result": ([Node(0, Input("x", KIND), (), (KIND,))], [("y", Value(0, 1))], "no such result"),
    "no_output": ([Node(0, Input("x", KIND), (), (KIND,))], [], "at least one output"),
    "output_twice": ([Node(0, Input("x", KIND), (), (KIND,))], [("y", Value(0)), ("y", Value(0))], "distinct"),
    "number_twice": ([Node(0, Input(name, KIND), (), (KIND,)) for name in "ab"], [("y", Value(0))], "used twice"),
    "input_twice": ([Node(i, Input("x", KIND), (), (KIND,)) for i in range(2)], [("y", Value(0))], "input names"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_graph_refuses_broken_structure(name: str):
    """A graph that does not hold together cannot be made."""
    nodes, outputs, message = STRUCTURE[name]
    with pytest.raises(GraphError, match=message):
        Graph(nodes, outputs)
