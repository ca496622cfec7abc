"""Passes as text in, text out, and the machinery around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from ir.builder import Builder, Tensor
from ir.component import Component as ComponentClass
from ir.component import Norm, option
from ir.errors import GraphError, ParseError
from ir.graph import Graph, Node, Value
from ir.interpret import evaluate
from ir.op import Array
from ir.ops.contraction import Matmul
from ir.ops.convolution import Conv
from ir.ops.elementwise import Exp, Mul, Neg
from ir.ops.normalization import BatchNorm
from ir.ops.structure import Component
from ir.passes.base import Pass, Pipeline
from ir.passes.canonicalize import Canonicalize
from ir.passes.cse import Cse
from ir.passes.dce import Dce
from ir.passes.expand_components import ExpandComponents
from ir.passes.fold_constants import FoldConstants
from ir.passes.lower_batch_norm import LowerBatchNorm
from ir.passes.lower_convolutions import LowerConvolutions
from ir.passes.lower_precision import LowerPrecision, precision_of
from ir.passes.merge_branches import MergeBranches
from ir.passes.unroll_loops import UnrollLoops
from ir.rewrite import Replacement, Rewriter, rebuild, rewrite
from ir.serialize import graph_from_json, graph_to_json
from ir.text import parse_graph, print_graph
from ir.types import Axis, TensorType
from tests.ir.models import decoder

INPUTS = """
  %0 = input "x" : float32[2, 3]
  %1 = input "y" : float32[2, 3]
  %2 = input "h" : float16[1, 3]
  %3 = input "q" : float32[1, 4, 2, 2]
  %4 = input "p" : int32[]
  %5 = input "c" : bool[2, 3]
"""


def graph_of(body: str) -> Graph:
    return parse_graph(f"graph main {{{INPUTS}{body}}}")


def body_of(graph: Graph) -> str:
    """The text after the inputs, on one line for each node."""
    lines = [line.strip() for line in print_graph(graph).splitlines()[1:-1]]
    return "\n".join(line for line in lines if " = input " not in line)


CANONICAL: dict[str, tuple[str, str]] = {
    "sort_operands": ("%6 = add %1, %0 : float32[2, 3] return r=%6", "%6 = add %0, %1 : float32[2, 3]\nreturn r=%6"),
    "number_last": (
        "%6 = constant 2.0 : float32[] %7 = mul %6, %0 : float32[2, 3] return r=%7",
        "%6 = constant 2.0 : float32[]\n%7 = mul %0, %6 : float32[2, 3]\nreturn r=%7",
    ),
    "times_one": ("%6 = constant 1.0 : float32[] %7 = mul %6, %0 : float32[2, 3] return r=%7", "return r=%0"),
    "plus_zero": (
        "%6 = constant [0.0, -0.0, 0.0] : float32[3] %7 = add %0, %6 : float32[2, 3] return r=%7",
        "return r=%0",
    ),
    "minus_zero": ("%6 = constant 0.0 : float32[] %7 = sub %0, %6 : float32[2, 3] return r=%7", "return r=%0"),
    "over_one": ("%6 = constant 1.0 : float32[] %7 = div %0, %6 : float32[2, 3] return r=%7", "return r=%0"),
    "power_one": ("%6 = constant 1.0 : float32[] %7 = pow %0, %6 : float32[2, 3] return r=%7", "return r=%0"),
    "zero_minus_stays": (
        "%6 = constant 0.0 : float32[] %7 = sub %6, %0 : float32[2, 3] return r=%7",
        "%6 = constant 0.0 : float32[]\n%7 = sub %6, %0 : float32[2, 3]\nreturn r=%7",
    ),
    "plus_zero_that_broadcasts_stays": (
        "%6 = constant [[0.0], [0.0]] : float32[2, 1] %7 = slice %0 {axis=0, start=0, stop=1} : float32[1, 3] "
        "%8 = add %7, %6 : float32[2, 3] return r=%8",
        "%6 = constant [[0.0], [0.0]] : float32[2, 1]\n%7 = slice %0 {axis=0, start=0, stop=1} : float32[1, 3]\n"
        "%8 = add %7, %6 : float32[2, 3]\nreturn r=%8",
    ),
    "minus_one": (
        "%6 = constant -1.0 : float32[] %7 = mul %0, %6 : float32[2, 3] return r=%7",
        "%6 = neg %0 : float32[2, 3]\nreturn r=%6",
    ),
    "plus_negative": (
        "%6 = neg %0 : float32[2, 3] %7 = add %6, %1 : float32[2, 3] return r=%7",
        "%6 = sub %1, %0 : float32[2, 3]\nreturn r=%6",
    ),
    "minus_negative": (
        "%6 = neg %1 : float32[2, 3] %7 = sub %0, %6 : float32[2, 3] return r=%7",
        "%6 = add %0, %1 : float32[2, 3]\nreturn r=%6",
    ),
    "square": ("%6 = mul %0, %0 : float32[2, 3] return r=%6", "%6 = square %0 : float32[2, 3]\nreturn r=%6"),
    "maximum_of_one": ("%6 = maximum %0, %0 : float32[2, 3] return r=%6", "return r=%0"),
    "relu": (
        "%6 = constant 0.0 : float32[] %7 = maximum %0, %6 : float32[2, 3] return r=%7",
        "%6 = relu %0 : float32[2, 3]\nreturn r=%6",
    ),
    "double_negation": ("%6 = neg %0 : float32[2, 3] %7 = neg %6 : float32[2, 3] return r=%7", "return r=%0"),
    "negated_difference": (
        "%6 = sub %0, %1 : float32[2, 3] %7 = neg %6 : float32[2, 3] return r=%7",
        "%6 = sub %1, %0 : float32[2, 3]\nreturn r=%6",
    ),
    "hidden_sign": (
        "%6 = neg %0 : float32[2, 3] %7 = abs %6 : float32[2, 3] return r=%7",
        "%6 = abs %0 : float32[2, 3]\nreturn r=%6",
    ),
    "double_relu": (
        "%6 = relu %0 : float32[2, 3] %7 = relu %6 : float32[2, 3] return r=%7",
        "%6 = relu %0 : float32[2, 3]\nreturn r=%6",
    ),
    "equal_branches": ("%6 = where %5, %0, %0 : float32[2, 3] return r=%6", "return r=%0"),
    "absorb_broadcast": (
        "%6 = constant 3.0 : float32[] %7 = broadcast %6 {shape=[2, 3]} : float32[2, 3] "
        "%8 = maximum %7, %0 : float32[2, 3] return r=%8",
        "%6 = constant 3.0 : float32[]\n%7 = maximum %0, %6 : float32[2, 3]\nreturn r=%7",
    ),
    "same_dtype": ('%6 = cast %0 {dtype="float32"} : float32[2, 3] return r=%6', "return r=%0"),
    "wide_and_back": (
        '%6 = cast %2 {dtype="float32"} : float32[1, 3] %7 = cast %6 {dtype="float16"} : float16[1, 3] return r=%7',
        "return r=%2",
    ),
    "narrow_and_back_stays": (
        '%6 = cast %0 {dtype="float16"} : float16[2, 3] %7 = cast %6 {dtype="float32"} : float32[2, 3] return r=%7',
        '%6 = cast %0 {dtype="float16"} : float16[2, 3]\n%7 = cast %6 {dtype="float32"} : float32[2, 3]\nreturn r=%7',
    ),
    "transposed_operand": (
        "%6 = transpose %1 {permutation=[1, 0]} : float32[3, 2] %7 = matmul %0, %6 : float32[2, 2] return r=%7",
        "%6 = matmul %0, %1 {transpose_b=true} : float32[2, 2]\nreturn r=%6",
    ),
    "inactive_masks": (
        "%6 = attention %3, %3, %3 {scale=1.0, window=4, alibi=[0.0, 0.0]} : float32[1, 4, 2, 2] return r=%6",
        "%6 = attention %3, %3, %3 {scale=1.0} : float32[1, 4, 2, 2]\nreturn r=%6",
    ),
    "active_window_stays": (
        "%6 = attention %3, %3, %3 {scale=1.0, window=3} : float32[1, 4, 2, 2] return r=%6",
        "%6 = attention %3, %3, %3 {scale=1.0, window=3} : float32[1, 4, 2, 2]\nreturn r=%6",
    ),
    "one_query": (
        "%6 = slice %3 {axis=1, start=3, stop=4} : float32[1, 1, 2, 2] "
        "%7 = attention %6, %3, %3 {scale=1.0, causal=true} : float32[1, 1, 2, 2] return r=%7",
        "%6 = slice %3 {axis=1, start=3, stop=4} : float32[1, 1, 2, 2]\n"
        "%7 = attention %6, %3, %3 {scale=1.0} : float32[1, 1, 2, 2]\nreturn r=%7",
    ),
    "reshape_of_reshape": (
        "%6 = reshape %0 {shape=[6]} : float32[6] %7 = reshape %6 {shape=[-1, 2]} : float32[3, 2] return r=%7",
        "%6 = reshape %0 {shape=[3, 2]} : float32[3, 2]\nreturn r=%6",
    ),
    "reshape_and_back": (
        "%6 = reshape %0 {shape=[6]} : float32[6] %7 = reshape %6 {shape=[2, 3]} : float32[2, 3] return r=%7",
        "return r=%0",
    ),
    "transpose_and_back": (
        "%6 = transpose %0 {permutation=[1, 0]} : float32[3, 2] "
        "%7 = transpose %6 {permutation=[1, 0]} : float32[2, 3] return r=%7",
        "return r=%0",
    ),
    "transpose_of_unit_axes": (
        "%6 = transpose %3 {permutation=[1, 2, 0, 3]} : float32[4, 2, 1, 2] return r=%6",
        "%6 = reshape %3 {shape=[4, 2, 1, 2]} : float32[4, 2, 1, 2]\nreturn r=%6",
    ),
    "whole_slice": ("%6 = slice %0 {axis=-1, start=0, stop=3} : float32[2, 3] return r=%6", "return r=%0"),
    "slice_of_slice": (
        "%6 = slice %3 {axis=1, start=1, stop=4} : float32[1, 3, 2, 2] "
        "%7 = slice %6 {axis=-3, start=0, stop=3, stride=2} : float32[1, 2, 2, 2] return r=%7",
        "%6 = slice %3 {axis=1, start=1, stop=4, stride=2} : float32[1, 2, 2, 2]\nreturn r=%6",
    ),
    "slice_of_concat": (
        "%6 = concat %0, %1 {axis=0} : float32[4, 3] "
        "%7 = slice %6 {axis=0, start=2, stop=4} : float32[2, 3] return r=%7",
        "return r=%1",
    ),
    "single_concat": ("%6 = concat %0 {axis=-1} : float32[2, 3] return r=%6", "return r=%0"),
    "nested_concat": (
        "%6 = concat %0, %1 {axis=0} : float32[4, 3] %7 = concat %6, %0 {axis=-2} : float32[6, 3] return r=%7",
        "%6 = concat %0, %1, %0 {axis=0} : float32[6, 3]\nreturn r=%6",
    ),
    "no_padding": ("%6 = pad %0 {low=[0, 0], high=[0, 0], value=3.0} : float32[2, 3] return r=%6", "return r=%0"),
    "pad_of_pad": (
        "%6 = pad %0 {low=[1, 0], high=[0, 0]} : float32[3, 3] %7 = pad %6 {low=[1, 0], high=[0, 2]} : float32[4, 5] "
        "return r=%7",
        "%6 = pad %0 {low=[2, 0], high=[0, 2]} : float32[4, 5]\nreturn r=%6",
    ),
    "broadcast_of_broadcast": (
        "%6 = broadcast %0 {shape=[1, 2, 3]} : float32[1, 2, 3] %7 = broadcast %6 {shape=[4, 2, 3]} : float32[4, 2, 3] "
        "return r=%7",
        "%6 = broadcast %0 {shape=[4, 2, 3]} : float32[4, 2, 3]\nreturn r=%6",
    ),
    "broadcast_that_adds_nothing": (
        "%6 = broadcast %0 {shape=[1, 2, 3]} : float32[1, 2, 3] return r=%6",
        "%6 = reshape %0 {shape=[1, 2, 3]} : float32[1, 2, 3]\nreturn r=%6",
    ),
    "axes_in_order": (
        "%6 = sum %3 {axes=[-1, 1]} : float32[1, 2] return r=%6",
        "%6 = sum %3 {axes=[1, 3]} : float32[1, 2]\nreturn r=%6",
    ),
    "sum_over_one": (
        "%6 = sum %3 {axes=[0]} : float32[4, 2, 2] return r=%6",
        "%6 = reshape %3 {shape=[4, 2, 2]} : float32[4, 2, 2]\nreturn r=%6",
    ),
    "axis_from_front": (
        "%6 = softmax %0 : float32[2, 3] return r=%6",
        "%6 = softmax %0 {axis=1} : float32[2, 3]\nreturn r=%6",
    ),
    "short_cumsum": ("%6 = cumsum %3 {axis=-4} : float32[1, 4, 2, 2] return r=%6", "return r=%3"),
    "whole_update": ("%6 = dynamic_update %0, %1, %4 {axis=0} : float32[2, 3] return r=%6", "return r=%1"),
}


@pytest.mark.parametrize("name", CANONICAL)
def test_canonicalize_rewrites(name: str):
    """Each rule gives the form that its docstring shows."""
    before, after = CANONICAL[name]
    assert body_of(Canonicalize()(graph_of(before))) == after


def test_canonicalize_keeps_scopes():
    """What a rule adds stands in the scope of what it replaces."""
    graph = graph_of("%6 = mul %0, %0 : float32[2, 3] @ layers.0 return r=%6")
    assert body_of(Canonicalize()(graph)) == "%6 = square %0 : float32[2, 3] @ layers.0\nreturn r=%6"


def test_cse_merges_equal_expressions():
    """Equal operations on equal values become one, in either order where they are commutative; hints do not count."""
    graph = graph_of(
        "%6 = add %0, %1 : float32[2, 3] %7 = add %1, %0 : float32[2, 3] %8 = sub %6, %7 : float32[2, 3] "
        "%9 = sub %0, %1 : float32[2, 3] %10 = sub %1, %0 : float32[2, 3] return a=%8, b=%9, c=%10"
    )
    assert body_of(Cse()(graph)) == (
        "%6 = add %0, %1 : float32[2, 3]\n%7 = sub %6, %6 : float32[2, 3]\n%8 = sub %0, %1 : float32[2, 3]\n"
        "%9 = sub %1, %0 : float32[2, 3]\nreturn a=%7, b=%8, c=%9"
    )


def test_cse_keeps_parameters_and_signed_zeros_apart():
    """Equal parameters are two; constants and attributes that differ in the sign of a zero are two."""
    graph = graph_of(
        '%6 = parameter "a" (d=3) init="fan_in" %7 = parameter "b" (d=3) init="fan_in" '
        "%8 = pad %0 {low=[1, 0], high=[0, 0]} : float32[3, 3] "
        "%9 = pad %0 {low=[1, 0], high=[0, 0], value=-0.0} : float32[3, 3] "
        "%10 = constant 0.0 : float32[] %11 = constant -0.0 : float32[] "
        "return a=%6, b=%7, c=%8, d=%9, e=%10, f=%11"
    )
    assert Cse()(graph).nodes == graph.nodes


def test_dce_drops_dead_nodes_and_keeps_inputs():
    """A dead operation and a dead parameter go; an input that nothing reads stays in the signature."""
    graph = graph_of(
        '%6 = exp %0 : float32[2, 3] %7 = parameter "w" (d=3) init="fan_in" %8 = neg %1 : float32[2, 3] return r=%8'
    )
    assert body_of(Dce()(graph)) == "%6 = neg %1 : float32[2, 3]\nreturn r=%6"
    assert list(Dce()(graph).inputs) == ["x", "y", "h", "q", "p", "c"]


def test_fold_constants_computes_what_it_can():
    """Operations on constants become constants, through several steps."""
    graph = graph_of(
        "%6 = constant [2.0, 3.0] : float32[2] %7 = square %6 : float32[2] %8 = sum %7 {axes=[0]} : float32[] "
        "%9 = add %0, %8 : float32[2, 3] return r=%9"
    )
    assert body_of(FoldConstants()(graph)) == (
        "%6 = constant 13.0 : float32[]\n%7 = add %0, %6 : float32[2, 3]\nreturn r=%7"
    )


def test_fold_constants_rounds_once_or_not_at_all():
    """The value is the float64 result rounded to float32, or stays computed where rounding is not allowed."""
    graph = graph_of("%6 = constant [0.1, 2.0] : float32[2] %7 = exp %6 : float32[2] return r=%7")
    assert FoldConstants(allow_rounding=False)(graph).nodes == graph.nodes
    folded = FoldConstants()(graph)
    expected = np.exp(np.array([0.1, 2.0], np.float32).astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(evaluate(folded, {}, {})["r"], expected)


def test_fold_constants_is_bounded():
    """A result with too many elements, and a broadcast of any size, stay computed at run time."""
    graph = graph_of(
        "%6 = constant [1.0, 2.0] : float32[2] %7 = pad %6 {low=[3], high=[0]} : float32[5] "
        "%8 = broadcast %6 {shape=[2, 2]} : float32[2, 2] return a=%7, b=%8"
    )
    assert len(FoldConstants(max_elements=4)(graph)) == len(graph)
    assert "constant [0.0, 0.0, 0.0, 1.0, 2.0]" in print_graph(FoldConstants(max_elements=5)(graph))


class Scaled(Norm):
    """A norm for these tests: times a parameter, optionally negated, optionally holding another component."""

    negate: bool = option(False)
    inner: bool = option(False)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        if self.inner:
            with b.scope("inner"):
                x = b.component("norm", "scaled", (), x)
        y = x * b.parameter("scale", ((Axis("d_model", x.shape[-1]),),), "constant(2)")
        return -y if self.negate else y

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x * params["scale"]


class Shrinking(Norm):
    """A component that breaks its promise about types."""

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return b.sum(x, 0)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x


def library(kind: str, key: str) -> type[ComponentClass]:
    """The two components above."""
    found = {"scaled": Scaled, "shrinking": Shrinking}.get(key)
    if kind != "norm" or found is None:
        raise GraphError(f"no {kind} named {key}")
    return found


def call(key: str, options: tuple[tuple[str, bool], ...] = ()) -> Graph:
    b = Builder()
    x = b.input("x", (2, 3))
    with b.scope("layers.0.norm"):
        y = b.component("norm", key, options, x)
    return b.build(y=b.exp(y))


def test_expand_components_puts_bodies_in_place():
    """The body stands under the node's scope, parameters named by it, components inside expanded too."""
    graph = ExpandComponents(library)(call("scaled", (("inner", True), ("negate", True))))
    assert body_of(graph) == (
        '%1 = parameter "layers.0.norm.inner.scale" (d_model=3) init="constant(2)" @ layers.0.norm.inner\n'
        "%2 = mul %0, %1 : float32[2, 3] @ layers.0.norm.inner\n"
        '%3 = parameter "layers.0.norm.scale" (d_model=3) init="constant(2)" @ layers.0.norm\n'
        "%4 = mul %2, %3 : float32[2, 3] @ layers.0.norm\n"
        "%5 = neg %4 : float32[2, 3] @ layers.0.norm\n"
        "%6 = exp %5 : float32[2, 3]\n"
        "return y=%6"
    )


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("missing", (), r"layers.0.norm/component_1 \(norm missing\): expand_components: no norm named missing"),
        ("scaled", (("negated", True),), "did you mean 'negate'"),
        ("shrinking", (), "other types than its node states"),
    ],
)
def test_expand_components_says_what_is_wrong(key: str, options: tuple[tuple[str, bool], ...], message: str):
    """An unknown component, an unknown option and a broken promise about types name the node."""
    with pytest.raises(GraphError, match=message):
        ExpandComponents(library)(call(key, options))


@dataclass(frozen=True)
class Breaking(Pass):
    """A pass that makes a malformed graph."""

    def run(self, graph: Graph) -> Graph:
        last = graph.nodes[-1]
        return Graph([*graph.nodes[:-1], Node(last.id, last.op, last.operands, (TensorType((9,)),))], graph.outputs)


def test_pass_is_verified_and_named():
    """A pass that breaks a rule is an error that names it."""
    with pytest.raises(GraphError, match="breaking: types are not what"):
        Breaking()(graph_of("%6 = neg %0 : float32[2, 3] return r=%6"))


def test_pipeline_runs_in_order_and_dumps():
    """Each pass gets what the one before gave; the dump sees every step."""
    seen: list[tuple[str, int]] = []
    pipeline = Pipeline((Canonicalize(), Dce()), dump=lambda name, graph: seen.append((name, len(graph))))
    graph = pipeline(graph_of("%6 = neg %0 : float32[2, 3] %7 = neg %6 : float32[2, 3] return r=%7"))
    assert seen == [("canonicalize", 6), ("dce", 6)]
    assert body_of(graph) == "return r=%0"


def test_rewrite_applies_rules_to_what_rules_add():
    """A node that a rule adds is itself rewritten, and a rule that changes a type is refused by name."""

    def exp_for_neg(r: Rewriter, node: Node) -> Replacement:
        return r.emit(Exp(), *node.operands)

    def operand_for_exp(r: Rewriter, node: Node) -> Replacement:
        return node.operands[0]

    graph = graph_of("%6 = neg %0 : float32[2, 3] return r=%6")
    assert body_of(rewrite(graph, {Neg: [exp_for_neg], Exp: [operand_for_exp]})) == "return r=%0"

    def other_input(r: Rewriter, node: Node) -> Replacement:
        return Value(3)

    with pytest.raises(GraphError, match="other_input changes the type"):
        rewrite(graph, {Neg: [other_input]})


def test_rebuild_visits_each_node_once():
    """`rebuild` hands over every node with rewritten operands, in order."""
    graph = graph_of("%6 = neg %0 : float32[2, 3] %7 = exp %6 : float32[2, 3] return r=%7")
    names: list[str] = []

    def visit(r: Rewriter, node: Node) -> tuple:
        names.append(node.op.name)
        return tuple(r.add(node))

    assert rebuild(graph, visit).nodes == graph.nodes
    assert names == [node.op.name for node in graph.nodes]


@pytest.mark.parametrize(
    "step",
    [
        *(UnrollLoops(), LowerBatchNorm(), MergeBranches(), LowerConvolutions()),
        *(Canonicalize(), FoldConstants(), Cse(), Dce()),
    ],
    ids=lambda step: step.name,
)
def test_pass_with_nothing_to_do_returns_its_graph(step: Pass):
    """No copy is made, so nothing is checked twice; what the pass changes once it leaves alone from then on."""
    graph = graph_of("%6 = neg %0 : float32[2, 3] return r=%6")
    live = Dce()(graph)
    assert step(live) is live
    model = decoder()
    done = step(model)
    assert step(done) is done


def test_rebuild_takes_changed_outputs_for_a_change():
    """The same nodes with another result are another graph."""
    graph = graph_of("%6 = neg %0 : float32[2, 3] return r=%6")

    def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
        results = rewriter.add(node)
        return node.operands if isinstance(node.op, Neg) else results

    assert body_of(rebuild(graph, visit)) == "return r=%0"


def test_components_survive_other_passes():
    """Passes before expansion leave component nodes as they are."""
    graph = Pipeline((Canonicalize(), FoldConstants(), Cse(), Dce()))(call("scaled"))
    assert [type(node.op) for node in graph.nodes].count(Component) == 1


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "patches": ((1, 7, 6, 2), (3, 2)),
    "pixels": ((2, 3, 4, 5), (1, 1)),
    "words": ((2, 9, 4), (3,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_lower_convolutions_multiplies_patches(name: str):
    """Windows that tile the input become a product with the same result."""
    shape, window = CONVOLUTIONS[name]
    b = Builder()
    weight = b.parameter("w", tuple((Axis(f"a{i}", size),) for i, size in enumerate((*window, shape[-1], 7))))
    graph = b.build(y=b.conv(b.input("x", shape), weight, strides=window))
    lowered = LowerConvolutions()(graph)
    rng = np.random.default_rng(0)
    inputs, params = {"x": rng.standard_normal(shape)}, {"w": rng.standard_normal(weight.shape)}
    expected, found = (evaluate(g, inputs, params)["y"] for g in (graph, lowered))
    assert not any(isinstance(node.op, Conv) for node in lowered.nodes)
    assert np.abs(found - expected).max() < 1e-12  # the same sums in another order, float64


def test_lower_convolutions_leaves_other_windows():
    """Windows that overlap, are padded or see only their group stay."""
    for strides, padding, groups in (((1,), ((0, 0),), 1), ((3,), ((1, 0),), 1), ((3,), ((0, 0),), 2)):
        b = Builder()
        weight = b.parameter("w", ((Axis("a", 3),), (Axis("c", 4 // groups),), (Axis("o", 4),)))
        graph = b.build(y=b.conv(b.input("x", (1, 9, 4)), weight, strides=strides, padding=padding, groups=groups))
        assert print_graph(LowerConvolutions()(graph)) == print_graph(graph)


@pytest.mark.parametrize("name", ["conv", "biased", "matmul", "shared", "bare"])
def test_lower_batch_norm_keeps_values(name: str):
    """Batch norm goes into the weights before it where nobody else reads that product; the values stay."""
    b = Builder()
    x = b.input("x", (2, 5, 4))
    weight = b.parameter("w", ((Axis("i", 4),), (Axis("o", 3),)))
    if name in ("conv", "biased"):
        kernel = b.parameter("k", ((Axis("a", 3),), (Axis("c", 4),), (Axis("o", 3),)))
        product = b.conv(x, kernel, padding=((1, 1),))
        product = product + b.parameter("b", ((Axis("o", 3),),)) if name == "biased" else product
    else:
        product = b.tanh(x) if name == "bare" else b.matmul(x, weight)
    y = b.batch_norm(product, "norm")
    graph = b.build(y=y + product if name == "shared" else y)
    lowered = LowerBatchNorm()(graph)
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 5, 4))}
    params = {label: rng.standard_normal(node.types[0].shape) for label, node in graph.parameters.items()}
    params["norm_variance"] = np.square(params["norm_variance"]) + 0.1
    expected, found = (evaluate(g, inputs, params)["y"] for g in (graph, lowered))
    assert not any(isinstance(node.op, BatchNorm) for node in lowered.nodes)
    assert np.abs(found - expected).max() < 1e-10  # epsilon becomes a float32 constant
    producers = [lowered.node(node.operands[1].node).op for node in lowered.nodes if isinstance(node.op, Conv | Matmul)]
    assert [isinstance(op, Mul) for op in producers] == ([] if name == "bare" else [name != "shared"])


@pytest.mark.parametrize(
    ("name", "convolutions"), [("kernels", 1), ("three", 1), ("identity", 1), ("strides", 2), ("read", 2), ("dense", 1)]
)
def test_merge_branches_keeps_values(name: str, convolutions: int):
    """Branches on one input become one convolution where they are alike and nobody else reads them."""
    b = Builder()
    x = b.input("x", (2, 6, 7, 4))

    def conv(label: str, size: int, groups: int = 1, strides: tuple[int, int] = (1, 1)) -> Tensor:
        axes = ((Axis("h", size),), (Axis("w", size),), (Axis("c", 4 // groups),), (Axis("o", 4),))
        around = ((size // 2, size // 2),) * 2
        y = b.conv(x, b.parameter(label, axes), strides=strides, padding=around, groups=groups)
        return y + b.parameter(f"{label}_bias", ((Axis("o", 4),),))

    if name == "identity":
        y = x + conv("a", 3, groups=4)
    elif name == "dense":
        y = x + conv("a", 3)
    elif name == "strides":
        y = conv("a", 3, strides=(2, 2)) + b.slice(b.slice(conv("b", 1), 1, 0, 6, 2), 2, 0, 7, 2)
    else:
        first = conv("a", 3)
        y = first + conv("b", 1)
        y = y + conv("c", 5) if name == "three" else y + b.tanh(first) if name == "read" else y
    graph = b.build(y=y)
    merged = MergeBranches()(graph)
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 6, 7, 4))}
    params = {label: rng.standard_normal(node.types[0].shape) for label, node in graph.parameters.items()}
    expected, found = (evaluate(g, inputs, params)["y"] for g in (graph, merged))
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max() * 10  # the same sums in another order
    assert sum(isinstance(node.op, Conv) for node in merged.nodes) == convolutions


PRODUCTS = """
  %6 = parameter "w" (rows=2) (columns=3) init="fan_in"
  %7 = neg %6 : float32[2, 3]
  %8 = matmul %0, %7 {transpose_b=true} : float32[2, 2]
  %9 = matmul %0, %1 {transpose_b=true} : float32[2, 2]
  %10 = add %8, %9 : float32[2, 2]
  return r=%10
"""


def test_lower_precision_rounds_products_with_weights():
    """A product with what parameters alone decide changes, one of two run-time values does not; back again, too."""
    graph = graph_of(PRODUCTS)
    lowered = LowerPrecision("bfloat16")(graph)
    before = "%8 = matmul %0, %7 {transpose_b=true}"
    after = '%8 = matmul %0, %7 {transpose_b=true, precision="bfloat16"}'
    assert body_of(lowered) == body_of(graph).replace(before, after)
    assert (precision_of(graph), precision_of(lowered)) == ("float32", "bfloat16")
    assert LowerPrecision("float32")(lowered).nodes == graph.nodes


def test_lowered_precision_survives_text_json_and_simplification():
    """The attribute is printed, parsed and stored, and moving a transposition into the product keeps it."""
    lowered = LowerPrecision("bfloat16")(graph_of(PRODUCTS))
    assert parse_graph(print_graph(lowered)).nodes == lowered.nodes
    assert graph_from_json(graph_to_json(lowered)).nodes == lowered.nodes
    turned = graph_of(
        "%6 = transpose %1 {permutation=[1, 0]} : float32[3, 2] "
        '%7 = matmul %0, %6 {precision="bfloat16"} : float32[2, 2] return r=%7'
    )
    assert body_of(Canonicalize()(turned)) == (
        '%6 = matmul %0, %1 {transpose_b=true, precision="bfloat16"} : float32[2, 2]\nreturn r=%6'
    )


def test_lower_precision_knows_its_precisions():
    """A misspelt precision is refused before any graph is seen."""
    with pytest.raises(GraphError, match="float32 or bfloat16"):
        LowerPrecision("bf16")


LOOP = """graph main {
  %0 = input "x" : float32[2, 3]
  %1 = input "y" : float32[2, 3]
  %2 = parameter "layer.w" (c=3) init="fan_in" @ layer
  %3.0, %3.1 = loop %0, %1, %2 {times=2, body=graph main {
    %0 = input "x0" : float32[2, 3] @ layer
    %1 = input "x1" : float32[2, 3] @ layer
    %2 = input "layer.w" : float32[3] @ layer
    %3 = mul %0, %2 : float32[2, 3] @ layer
    return y0=%1, y1=%3
  }} : float32[2, 3], float32[2, 3] @ layer
  return r=%3.0
}
"""


def looped() -> Graph:
    """Two values that change places, one of them scaled by a weight of the model."""
    b = Builder()
    x, y = b.input("x", (2, 3)), b.input("y", (2, 3))

    def turn(inner: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del given
        return carried[1], carried[0] * inner.parameter("w", ((Axis("c", 3),),))

    with b.scope("layer"):
        result, _ = b.loop(2, turn, (x, y))
    return b.build(r=result)


def test_loop_prints_its_body_and_parses_back():
    """Parameters of the body belong to the model; inside they are inputs of the same names."""
    assert print_graph(looped()) == LOOP
    assert print_graph(parse_graph(LOOP)) == LOOP


def test_unrolled_loop_is_its_turns():
    """Weights are read in each turn, scopes stay, results keep their order."""
    unrolled = UnrollLoops()(looped())
    assert print_graph(unrolled).splitlines()[4:] == [
        "  %3 = mul %0, %2 : float32[2, 3] @ layer",
        "  return r=%3",
        "}",
    ]
    assert UnrollLoops()(unrolled) is unrolled


def test_loop_of_a_loop_is_unrolled_and_parses_back():
    """Loops nest: 2 turns of 3 turns are 6."""
    b = Builder()

    def inner(c: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (carried[0] * c.parameter("w", ((Axis("c", 3),),)) + given[0],)

    def outer(c: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return c.loop(3, inner, carried, given)

    x = b.input("x", (2, 3))
    (y,) = b.loop(2, outer, (x,), (x,))
    graph = b.build(y=y)
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)
    assert sum(isinstance(node.op, Mul) for node in UnrollLoops()(graph).nodes) == 6
    given, weight = np.arange(6.0).reshape(2, 3) / 8, np.array([0.5, -1.0, 1.0])
    expected = given
    for _ in range(6):
        expected = expected * weight + given
    assert np.array_equal(evaluate(graph, {"x": given}, {"w": weight})["y"], expected)  # all numbers are exact


def test_bodies_that_cannot_be_are_refused():
    """A body with a parameter has no meaning; text with loops in loops has an end."""
    wrong = LOOP.replace('input "layer.w" : float32[3] @', 'parameter "layer.w" (c=3) init="fan_in" @', 1)
    with pytest.raises(ParseError, match="operands do not fit the body"):
        parse_graph(wrong)
    nested = "graph main { %0 = loop {times=1, body=" * 10
    with pytest.raises(ParseError, match="nested too deeply"):
        parse_graph(nested)
