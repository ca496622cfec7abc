"""Every row of the ONNX table against the numpy meaning of its operation, in ONNX Runtime."""

from __future__ import annotations

import importlib
import importlib.util
import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from codegen.container import relative_error
from codegen.onnx_export.export import to_onnx
from codegen.onnx_export.table import ONNX
from codegen.torch_backend import to_module
from ir.builder import Builder, Tensor
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops.convolution import Pool
from ir.ops.elementwise import Cast, Compare
from ir.ops.recurrence import DECAYS, Decay
from ir.ops.sorting import TopK
from ir.passes.lower_precision import LowerPrecision
from ir.types import Axis
from tests.codegen.onnx_cases import TOLERANCE, check_onnx, in_runtime, needs_runtime
from tests.codegen.test_torch_attention import OPTIONS
from tests.codegen.test_torch_attention import graphs as normalised_graphs
from tests.codegen.test_torch_backend import (
    DISCRETE,
    POOLS,
    SMOOTH,
    attention_graphs,
    draw,
    graph_of,
    in_torch,
    outer_scan,
)
from tests.codegen.test_torch_delta import DECAYS as DELTA_DECAYS
from tests.codegen.test_torch_delta import delta_rule
from tests.ir import random_graphs

pytestmark = needs_runtime

CASES = SMOOTH | POOLS | DISCRETE


def swapping(b: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A turn with a parameter, a recurrence and what is given; what is carried changes places."""
    first, second = carried
    weight = b.parameter("w", ((Axis("c", 3),), (Axis("c", 3),)))
    return second, b.tanh(b.matmul(b.linear_scan(second, first), weight) + given[0])


def nested(b: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A loop in a loop."""
    return b.loop(2, lambda inner, c, g: (halved(inner, c[0]) + g[0],), carried, given)


def halved(b: Builder, x: Tensor) -> Tensor:
    """Half of x."""
    return x * b.constant(0.5)


LOOPS = {
    "loop": graph_of(lambda b, x, y, z: b.concat(0, *b.loop(3, swapping, (x, y), (z,))), *[(2, 5, 3)] * 3),
    "loop_once": graph_of(lambda b, x, y, z: b.loop(1, swapping, (x, y), (z,))[1], *[(2, 5, 3)] * 3),
    "loop_nested": graph_of(lambda b, x, z: b.loop(3, nested, (x,), (z,))[0], (2, 3), (3,)),
}
OWN = {
    "bool_comparison": graph_of(lambda b, x, y: b.less(x, y), (3, 5), (5,), dtypes="bb"),
    "where_bool": graph_of(lambda b, c, x: b.where(c, x, b.equal(c, x)), (3, 1), (3, 5), dtypes="bb"),
    "gather_one_row": graph_of(lambda b, x, i: b.gather(x, i, 1), (2, 4, 3), (1, 5, 1), dtypes="fi"),
    "pad_ints": graph_of(lambda b, x: b.pad(x, 1, 2, 1, 3.0), (2, 3), dtypes="i"),
    "smallest": graph_of(lambda b, x: b.concat(0, *(b.apply_all(TopK(3, largest=False), x)[:1])), (2, 7)),
    "long_conv_one_tap": graph_of(lambda b, x, h: b.long_conv(x, h), (2, 1, 3), (1, 3)),
    **{f"fft_{n}": graph_of(lambda b, x, y: b.concat(0, *b.fft(x, y, 1)), (2, n, 3), (2, n, 3)) for n in (1, 2, 8)},
    **{
        f"ifft_{n}": graph_of(lambda b, x, y: b.concat(0, *b.fft(x, y, 1, inverse=True)), (2, n, 3), (2, n, 3))
        for n in (1, 2, 8, 9)
    },
    **{f"rfft_{n}": graph_of(lambda b, x: b.concat(0, *b.rfft(x, 1)), (2, n, 3)) for n in (1, 2, 8)},
    **{
        f"irfft_{n}": graph_of(lambda b, x, y, n=n: b.irfft(x, y, 1, n), (2, n // 2 + 1, 3), (2, n // 2 + 1, 3))
        for n in (1, 2, 3, 4, 8)
    },
    "max_pool_wide_padding": graph_of(
        lambda b, x: b.maximum(b.pool(x, Pool("max", (2,), (1,), ((2, 1),))), -9.0), (1, 3, 2)
    ),
    "average_pool_wide_padding": graph_of(
        lambda b, x: b.pool(x, Pool("average", (2, 1), (1, 2), ((2, 1), (0, 1)), True)), (1, 3, 4, 2)
    ),
}


@pytest.mark.parametrize("name", [*CASES, *OWN, *LOOPS])
def test_row_equals_numpy(name: str) -> None:
    """Each operation gives in ONNX Runtime what it gives in numpy, on odd shapes."""
    graph = (CASES | OWN | LOOPS)[name]
    check_onnx(graph, draw(graph))


def test_cases_cover_every_row() -> None:
    """No row of the table is left without a case."""
    graphs = (*CASES.values(), *LOOPS.values(), *attention_graphs(3, 5, 95), outer_scan("none", 3))
    seen = {type(node.op) for graph in graphs for node in graph.nodes}
    assert [op.name for op in ONNX if op not in seen] == []


@pytest.mark.parametrize(("queries", "keys", "every"), [(1, 5, 7), (5, 5, 7), (3, 7, 5), (7, 3, 5)])
def test_attention_equals_numpy(queries: int, keys: int, every: int) -> None:
    """Causality, windows, slopes, grouped heads, run-time offsets and biases, alone and together."""
    for graph in attention_graphs(queries, keys, every):
        for position in (0, keys + 4) if "offset" in graph.inputs else (0,):
            inputs = draw(graph)
            if "offset" in inputs:
                inputs["offset"] = np.array(position, np.int32)
            check_onnx(graph, inputs)


@pytest.mark.parametrize("case", OPTIONS)
def test_other_normalisers_equal_numpy(case: str) -> None:
    """Sigmoid and clipped softmax, with masks, offsets and biases."""
    for graph in normalised_graphs(OPTIONS[case]):
        check_onnx(graph, draw(graph))


@pytest.mark.parametrize("case", [{}, *OPTIONS.values()], ids=["softmax", *OPTIONS])
@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 6), (5, 1)])
def test_bias_of_minus_infinity_hides_keys(shape: tuple[int, ...], case: dict) -> None:
    """A hidden key has no weight, and a query that sees none gives zeros, with a mask beside it too."""
    for causal in (False, True):
        b = Builder()
        q, kv = b.input("q", (2, 5, 4, 3)), b.input("kv", (2, 6, 2, 3))
        graph = b.build(y=b.attention(q, kv, kv, causal=causal, bias=b.input("bias", shape), **case))
        inputs = draw(graph)
        inputs["bias"] = np.where(inputs["bias"] < 0.3, -np.inf, inputs["bias"])
        inputs["bias"][..., :1, :] = -np.inf
        check_onnx(graph, inputs)


@pytest.mark.parametrize("decay", DECAYS)
def test_outer_scan_equals_numpy(decay: Decay) -> None:
    """One step and several, with and without an initial state."""
    for steps, state in itertools.product((1, 2, 7), (False, True)):
        graph = outer_scan(decay, steps, state=state)
        check_onnx(graph, draw(graph))


@pytest.mark.parametrize("decay", DELTA_DECAYS)
def test_delta_rule_equals_numpy(decay: Decay) -> None:
    """One step and several, with and without an initial state."""
    for steps, state in itertools.product((1, 7), (False, True)):
        graph = delta_rule(decay, steps, state=state)
        check_onnx(graph, draw(graph))


def test_strong_decay_gives_no_infinity() -> None:
    """Decays that vanish in float32 leave the current step alone."""
    for decay in ("head", "key"):
        graph = outer_scan(decay, 9)
        inputs = draw(graph)
        inputs["gate0"] = inputs["gate0"] + 100.0
        check_onnx(graph, inputs)


def test_far_positions_keep_their_angles() -> None:
    """Angles of tens of thousands are computed in float64: a float32 product would lose three digits."""
    graph = SMOOTH["rope_offset"]
    check_onnx(graph, draw(graph) | {"x1": np.array(54_321, np.int32)})


def test_long_transforms_keep_their_digits() -> None:
    """Lengths that are no power of two do not lose digits with their length; the long convolution neither."""
    length = 1000
    graph = graph_of(lambda b, x, y: b.concat(0, *b.fft(x, y, 1)), (1, length, 2), (1, length, 2))
    check_onnx(graph, draw(graph))
    graph = graph_of(lambda b, x, h: b.long_conv(x, h), (1, length, 2), (length, 2))
    check_onnx(graph, draw(graph))


def test_products_round_their_operands() -> None:
    """With a precision, the same operands are rounded as in numpy, and the sums stay wide."""
    weight = ((Axis("a", 5),), (Axis("b", 7),))
    plain = graph_of(lambda b, x: b.matmul(x, b.parameter("w", weight), transpose_a=True), (2, 5, 3))
    rounded, params = LowerPrecision("bfloat16")(plain), initialize(plain, 0)
    check_onnx(rounded, draw(plain))
    difference = in_runtime(rounded, params, draw(plain))["y"] - in_runtime(plain, params, draw(plain))["y"]
    assert 1e-4 < np.abs(difference).max() < 1e-1  # bfloat16 has 8 bits


SECOND = {
    **{name: CASES[name] for name in ("linear_scan", "rfft", "rfft_even", "irfft_even", "long_conv", "rope_offset")},
    **LOOPS,
    **{f"outer_scan_{decay}": outer_scan(decay, 5) for decay in DECAYS},
    "delta_rule": delta_rule("key", 5, state=True),
}


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed: make bench-deps")
@pytest.mark.parametrize("name", SECOND)
def test_second_runtime_agrees(name: str) -> None:
    """What runtimes differ in most, loops and transforms, is written so that OpenVINO reads it as ONNX Runtime does."""
    openvino = importlib.import_module("openvino")
    graph = SECOND[name]
    params, inputs = initialize(graph, 0), draw(graph)
    core = openvino.Core()
    model = core.read_model(to_onnx(graph, params).SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {label: np.float32 if node.types[0].is_float else np.int32 for label, node in graph.inputs.items()}
    found = compiled({label: np.asarray(array, kinds[label]) for label, array in inputs.items()})
    for label, expected in evaluate(graph, inputs, params).items():
        assert relative_error(found[label], expected) <= TOLERANCE


EXACT = [recipe for op, recipe in random_graphs.RECIPES.items() if op not in (Cast, Compare, TopK)]
"""Operations that do not jump: a rounding in float32 tips a comparison, or an integer, to the other side."""


@settings(max_examples=40, deadline=None)
@given(graph=random_graphs.graphs(recipes=EXACT))
def test_random_graph_equals_numpy(graph: Graph) -> None:
    """Any graph passes the checker and is the same function: where torch keeps five digits, four are kept."""
    inputs, params = random_graphs.draw_values(graph)
    narrow = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in inputs.items()}
    expected = random_graphs.run(graph, inputs, params)
    in_float32 = in_torch(to_module(graph, params).eval(), narrow)
    found = in_runtime(graph, params, narrow)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        if np.isfinite(array).all() and relative_error(in_float32[name], array) <= 1e-5:
            assert relative_error(found[name], array) <= 1e-4
