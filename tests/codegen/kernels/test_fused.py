"""Chains of elementwise and shape operations: a table of odd shapes, and random chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.base import Isa
from codegen.kernels.expressions import EXPRESSIONS
from codegen.kernels.fused import FusedKernel
from ir.builder import Builder, Tensor
from ir.graph import Graph
from ir.ops import elementwise as ew
from ir.ops.reduction import Max, Mean, Sum
from tests.codegen.kernels.batches import ISAS, check_all, inputs_of


def chain(make: Any, *shapes: tuple[int, ...], dtypes: str = "") -> FusedKernel:
    """The chain `make(b, *inputs)`; `dtypes` has a letter for each input, f unless said otherwise."""
    b = Builder()
    names = {"f": "float32", "i": "int32", "b": "bool"}
    letters = dtypes.ljust(len(shapes), "f")
    inputs = [b.input(f"x{i}", shape, names[letters[i]]) for i, shape in enumerate(shapes)]
    return FusedKernel(b.build(y=make(b, *inputs)))


def unary(op: ew.Unary, *, positive: bool = False) -> FusedKernel:
    """One function over a row that is no whole number of vectors."""
    return chain(lambda b, x: b.apply(op, b.sigmoid(x) if positive else x), (3, 37))


FUNCTIONS = {
    **{
        type(op).__name__: unary(op)
        for op in (
            *(ew.Neg(), ew.Exp(), ew.Abs(), ew.Sin(), ew.Cos(), ew.Tanh(), ew.Erf(), ew.Sigmoid()),
            *(ew.Relu(), ew.Silu(), ew.Gelu(), ew.Softplus(), ew.Square()),
        )
    },
    **{type(op).__name__: unary(op, positive=True) for op in (ew.Log(), ew.Sqrt(), ew.Rsqrt())},
    **{
        type(op).__name__: chain(lambda b, x, y, op=op: b.apply(op, x, y), (3, 37), (37,))
        for op in (ew.Add(), ew.Sub(), ew.Mul(), ew.Maximum(), ew.Minimum())
    },
    "Div": chain(lambda b, x, y: x / (b.sigmoid(y) + 0.1), (3, 37), (3, 1)),
    "Pow": chain(lambda b, x, y: b.apply(ew.Pow(), b.sigmoid(x), b.tanh(y)), (3, 37), (3, 37)),
}
MOVES = {
    "transpose": chain(lambda b, x: b.transpose(x, 0, 2, 1) * 1.5, (2, 5, 33)),
    "transpose_heads": chain(lambda b, x, y: b.transpose(x, 0, 2, 1, 3) + y, (2, 5, 3, 17), (2, 3, 5, 17)),
    "slices": chain(lambda b, x: b.slice(x, 2, 3, 40) + b.slice(x, 2, 0, 37), (2, 5, 70)),
    "slice_stride": chain(lambda b, x: b.slice(b.slice(x, 2, 1, 70, 3), 1, 1, 5, 2), (2, 5, 70)),
    "concat_rows": chain(lambda b, x, y: b.concat(1, x, y), (2, 5, 33), (2, 3, 33)),
    "concat_columns": chain(lambda b, x, y, z: b.concat(-1, x, y, z), (2, 5, 33), (2, 5, 1), (2, 5, 20)),
    "rotate_half": chain(lambda b, x: b.concat(2, -b.slice(x, 2, 18, 36), b.slice(x, 2, 0, 18)), (2, 5, 36)),
    "pad_rows": chain(lambda b, x: b.pad(x, 1, 2, 1, -1.0), (2, 5, 33)),
    "pad_columns": chain(lambda b, x: b.pad(b.pad(x, 2, 3, 0), 2, 0, 5, 2.0), (2, 5, 33)),
    "shift_tokens": chain(lambda b, x: x - b.slice(b.pad(x, 1, 1, 0), 1, 0, 5), (2, 5, 33)),
    "reshape": chain(lambda b, x, w: b.reshape(x, 2, 5, 3, 11) * b.reshape(w, 3, 11), (2, 5, 33), (33,)),
    "reshape_merges_rows": chain(lambda b, x: b.reshape(b.transpose(x, 1, 0, 2), 5, 66), (2, 5, 33)),
    "broadcast_rows": chain(lambda b, x, w: x * b.broadcast(b.exp(w), 2, 5, 70), (2, 5, 70), (5, 1)),
    "broadcast_both_ways": chain(lambda b, x, y: x + y, (2, 1, 33), (5, 1)),
    "broadcast_scalar": chain(lambda b, x: b.broadcast(x, 3, 37), ()),
    "take": chain(lambda b, x, i: b.take(x, i), (7, 33), (2, 5), dtypes="fi"),
    "take_plus_position": chain(lambda b, x, i, p: b.take(x, i) + p, (7, 33), (2, 5), (5, 33), dtypes="fif"),
    "gather_rows": chain(lambda b, x, i: b.gather(x, i, 0), (2, 33), (5, 33), dtypes="fi"),
    "concat_of_gathers": chain(
        lambda b, x, i, y, j: b.concat(1, b.gather(x, i, 1), b.gather(y, j, 1)),
        *((1, 99, 49), (1, 91, 1), (1, 98, 49), (1, 90, 1)),
        dtypes="fifi",
    ),
    "pad_of_gather": chain(lambda b, x, i: b.pad(b.gather(x, i, 1), 1, 3, 5), (1, 99, 49), (1, 91, 1), dtypes="fi"),
    "take_one_column": chain(lambda b, x, i: b.take(x, i), (7, 1), (21,), dtypes="fi"),
    "update": chain(lambda b, x, u, i: b.dynamic_update(x, u, i, 1), (2, 7, 33), (2, 2, 33), (), dtypes="ffi"),
    "update_columns": chain(lambda b, x, u, i: b.dynamic_update(x, u, i, -1), (2, 7, 33), (2, 7, 20), (), dtypes="ffi"),
    "rope": chain(lambda b, x, i: b.rope(x, offset=i), (2, 5, 3, 20), (), dtypes="fi"),
    "rope_smallest": chain(lambda b, x, i: b.rope(x, offset=i), (2, 5, 3, 2), (), dtypes="fi"),
}
SELECTIONS = {
    "where": chain(lambda b, x, y: b.where(b.less(x, y), b.softplus(x), b.tanh(y)), (2, 5, 33), (2, 5, 33)),
    "where_less_equal": chain(lambda b, x, y: b.where(b.less_equal(x, y), x, 0.0), (2, 33), (33,)),
    "where_equal_ints": chain(lambda b, x, i, j: b.where(b.equal(i, j), x, -1.0), (3, 37), (3, 1), (37,), dtypes="fii"),
    "bool_input": chain(lambda b, c, x: b.where(c, x, 0.0), (3, 37), (3, 37), dtypes="bf"),
    "bool_output": chain(lambda b, x: b.less(x, b.constant(0.0)), (3, 37)),
    "to_int": chain(lambda b, x: b.cast(x * 3.0, "int32"), (3, 37)),
    "from_int": chain(lambda b, i: b.cast(i, "float32") * 0.5, (3, 37), dtypes="i"),
    "int_sum": chain(lambda b, i, j: i + j * i, (3, 37), (37,), dtypes="ii"),
    "two_numbers": chain(lambda b, x: b.maximum(b.minimum(x, 0.5), -0.5), (3, 37)),
}
SIZES = {
    "scalar": chain(lambda b, x: b.exp(x), ()),
    "one_element": chain(lambda b, x, y: x * y, (1, 1, 1), (1,)),
    "below_a_vector": chain(lambda b, x: b.silu(x) * 2 + x, (3,)),
    "one_vector": chain(lambda b, x: b.silu(x), (16,)),
    "flat": chain(lambda b, x: b.silu(x) * 2 + x, (3, 5, 37)),
    "flat_parallel": chain(lambda b, x, y: b.sigmoid(x) * y, (3, 500, 37), (3, 500, 37)),
    "flat_exact_pieces": chain(lambda b, x: b.relu(x), (8, 4096)),
    "rows_parallel": chain(lambda b, x, w: b.gelu(x + w), (300, 70), (70,)),
    "narrow_rows": chain(lambda b, x, w: x * w, (300, 3), (3,)),
    "copy": chain(lambda b, x: x, (3, 37)),
}
REDUCTIONS = {
    "sum_last": chain(lambda b, x: b.sum(x * x, -1), (2, 5, 33)),
    "sum_short_rows": chain(lambda b, x: b.sum(x, -1), (2, 5, 3)),
    "mean_middle": chain(lambda b, x: b.mean(x, 1), (2, 5, 33)),
    "mean_first_keepdims": chain(lambda b, x: b.mean(b.exp(x), 0, keepdims=True), (2, 5, 33)),
    "max_outer_axes": chain(lambda b, x: b.max(x, 0, 2, keepdims=True), (2, 5, 33)),
    "max_negative": chain(lambda b, x: b.max(-b.exp(x), 1), (2, 5, 33)),
    "sum_everything": chain(lambda b, x: b.sum(x, 0, 1, 2), (2, 5, 33)),
    "sum_axes_out_of_order": chain(lambda b, x: b.sum(x, -1, 0), (2, 5, 33, 3)),
    "mean_of_broadcast": chain(lambda b, x, y: b.mean(x + y, -2), (2, 1, 33), (5, 33)),
    "mean_of_transposed": chain(lambda b, x: b.mean(b.transpose(x, 0, 2, 1), -1), (2, 5, 33)),
    "mean_parallel": chain(lambda b, x: b.mean(x, 1), (4, 300, 65)),
    "sum_one_element": chain(lambda b, x: b.sum(x, 0), (1,)),
    "sum_bool": chain(lambda b, x: b.sum(b.cast(b.less(x, b.constant(0.0)), "float32"), 1), (3, 37)),
}
TABLE = FUNCTIONS | MOVES | SELECTIONS | SIZES | REDUCTIONS


@pytest.mark.parametrize("isa", ISAS)
def test_chain_equals_interpreter(isa: str) -> None:
    """Every fusible operation, alone and in chains, over rows with a rest."""
    check_all(TABLE, isa)


def test_chain_equals_interpreter_with_threads_or_none() -> None:
    """Where the pieces of a parallel loop end changes nothing."""
    check_all(SIZES | REDUCTIONS, "avx2", every_knob=True)


def test_table_covers_every_expression() -> None:
    """No operation that can be fused is left without a case."""
    seen = {type(node.op) for kernel in TABLE.values() for node in kernel.graph.nodes}
    assert [op.name for op in (*EXPRESSIONS, Sum, Mean, Max) if op not in seen] == []


@pytest.mark.parametrize("isa", ISAS)
def test_update_stops_at_its_ends(isa: str) -> None:
    """The first and the last position that an update fits at, and row indices at the table's end."""
    update, take = TABLE["update"], TABLE["take"]
    base, part, _ = inputs_of(update)
    table, indices = inputs_of(take)
    cases = {"first": update, "last": update, "take": take}
    inputs = {
        "first": [base, part, np.array(0, np.int32)],
        "last": [base, part, np.array(5, np.int32)],
        "take": [table, np.full_like(indices, 6)],
    }
    check_all(cases, isa, inputs=inputs)


FLOATS = (ew.Tanh(), ew.Sigmoid(), ew.Silu(), ew.Gelu(), ew.Relu(), ew.Neg(), ew.Abs(), ew.Softplus(), ew.Sin())
PAIRS = (ew.Add(), ew.Sub(), ew.Mul(), ew.Maximum(), ew.Minimum())
LENGTHS = st.sampled_from((1, 2, 3, 5, 17, 33))


@st.composite
def chains(draw: Any) -> FusedKernel:
    """A chain of one to six steps, each reading the one before; all functions are bounded or grow slowly."""
    b = Builder()
    y = b.input("x0", draw(st.lists(LENGTHS, min_size=1, max_size=3)))
    for step in range(1, draw(st.integers(1, 6)) + 1):
        y = _step(draw, b, y, f"x{step}")
    if draw(st.booleans()):
        axes = draw(st.lists(st.integers(0, y.type.rank - 1), min_size=1, unique=True))
        y = b.apply(draw(st.sampled_from((Sum, Mean, Max)))(tuple(axes), draw(st.booleans())), y)
    return FusedKernel(b.build(y=y))


def _step(draw: Any, b: Builder, y: Tensor, name: str) -> Tensor:
    axis = draw(st.integers(0, y.type.rank - 1))
    match draw(st.sampled_from(("unary", "pair", "self", "where", "transpose", "slice", "concat", "pad", "reshape"))):
        case "unary":
            return b.apply(draw(st.sampled_from(FLOATS)), y)
        case "pair":
            shape = [draw(st.sampled_from((1, size))) for size in y.shape][draw(st.integers(0, y.type.rank - 1)) :]
            pair = (b.tanh(y), b.input(name, shape))
            return b.apply(draw(st.sampled_from(PAIRS)), *(pair[::-1] if draw(st.booleans()) else pair))
        case "self":
            return b.apply(draw(st.sampled_from(PAIRS)), y, b.tanh(y))
        case "where":
            return b.where(b.less(y, b.constant(0.25)), y, 0.25)  # continuous, so that rounding cannot flip it
        case "transpose":
            return b.transpose(y, *draw(st.permutations(range(y.type.rank))))
        case "slice":
            start = draw(st.integers(0, y.shape[axis] - 1))
            return b.slice(y, axis, start, draw(st.integers(start + 1, y.shape[axis])), draw(st.integers(1, 2)))
        case "concat":
            return b.concat(axis, y, b.input(name, y.shape)) if y.type.size < 4000 else -y
        case "pad":
            low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            return b.pad(y, axis, low, high, 0.5) if y.type.size < 4000 else -y
        case _:
            first = draw(st.sampled_from([size for size in range(1, y.type.size + 1) if y.type.size % size == 0]))
            return b.reshape(y, first, -1)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=12)
@given(kernels=st.lists(chains(), min_size=4, max_size=8))
def test_random_chain_equals_interpreter(isa: str, kernels: list[FusedKernel]) -> None:
    """Whatever is chained, one pass over memory gives what the interpreter gives step by step."""
    check_all({f"chain{index}": kernel for index, kernel in enumerate(kernels)}, isa)


def test_key_names_the_chain_and_its_shapes() -> None:
    """Equal chains share a key; another shape or number is another workload."""

    def key(shape: tuple[int, ...], number: float) -> str:
        return chain(lambda b, x: b.exp(x) * number, shape).key

    assert key((3, 5), 2.0).startswith("fused(exp-mul,")
    assert key((3, 5), 2.0) == key((3, 5), 2.0)
    assert len({key((3, 5), 2.0), key((5, 3), 2.0), key((3, 5), 2.5)}) == 3


def test_long_chains_compile_quickly() -> None:
    """A value that is used twice is written once: forty steps stay forty steps, not a tree of 2^40."""
    b = Builder()
    y = b.input("x", (3, 37))
    for _ in range(10):
        y = b.silu(b.tanh(b.square(b.softplus(y))))
    kernel = FusedKernel(b.build(y=y))
    assert len(kernel.build(Isa("avx512", 16, 32, 2), {"parallel": False}).script()) < 400_000
    check_all({"long": kernel}, "avx2")


def test_flops_are_those_of_the_chain() -> None:
    """One operation an element for each step; moves cost nothing."""
    graph: Graph = TABLE["reshape"].graph
    assert TABLE["reshape"].flops == 2 * 5 * 33
    assert len(graph.inputs) == 2
