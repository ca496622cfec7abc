"""Every row of the torch backend against the numpy meaning of its operation, in float64.

Shape letters: B batch, T queries, S keys, H query heads, G key heads, K head size, V value size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from codegen.torch_backend import TORCH, GraphModule, to_module
from ir.builder import Builder, Tensor
from ir.errors import GraphError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops import elementwise as ew
from ir.ops.convolution import Pool
from ir.ops.elementwise import Cast, Compare
from ir.ops.recurrence import DECAYS, FORMS, Decay, Form
from ir.ops.sorting import TopK
from ir.passes.lower_precision import LowerPrecision
from ir.text import print_graph
from ir.types import Axis
from tests.ir import random_graphs

TOLERANCE = (
    1e-10  # of the output's scale: float64 sums of a few hundred products err by about 1e-14, exp and log by more
)
Make = Callable[..., Tensor]


def graph_of(make: Make, *shapes: tuple[int, ...], dtypes: str = "") -> Graph:
    """`make(b, *inputs)` as a graph; `dtypes` has a letter for each input, f unless said otherwise."""
    b = Builder()
    names = {"f": "float32", "i": "int32", "b": "bool"}
    letters = dtypes.ljust(len(shapes), "f")
    inputs = [b.input(f"x{i}", shape, names[letters[i]]) for i, shape in enumerate(shapes)]
    return b.build(y=make(b, *inputs))


def draw(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal numbers; integers below 3, so that they index every table here."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, node in graph.inputs.items():
        kind = node.types[0]
        whole = rng.integers(0, 3 if kind.dtype == "int32" else 2, kind.shape)
        drawn[name] = rng.standard_normal(kind.shape) if kind.is_float else np.asarray(whole, kind.dtype)
    return drawn


def in_torch(module: GraphModule, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a module on numpy arrays."""
    with torch.no_grad():  # no batch norm whose statistics are computed has a gradient
        results = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in results.items()}


def check(graph: Graph, inputs: dict[str, np.ndarray] | None = None) -> None:
    """Assert that torch and numpy agree in float64."""
    inputs = draw(graph) if inputs is None else inputs
    params = initialize(graph, 0)
    found = in_torch(to_module(graph, params, dtype=torch.float64).eval(), inputs)
    for name, expected in evaluate(graph, inputs, params).items():
        assert found[name].shape == expected.shape
        assert found[name].dtype.kind == expected.dtype.kind
        scale = max(float(np.abs(expected.astype(np.float64)).max()), 1.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE * scale)


def check_gradient(graph: Graph) -> None:
    """Assert that the gradients with respect to every float input match finite differences."""
    module = to_module(graph, dtype=torch.float64).eval()
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in draw(graph).items()}
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(module(**(tensors | dict(zip(names, values, strict=True)))).values())

    inputs = [tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


UNARY = {
    "neg": ew.Neg(),
    "exp": ew.Exp(),
    "abs": ew.Abs(),
    "sin": ew.Sin(),
    "cos": ew.Cos(),
    "tanh": ew.Tanh(),
    "erf": ew.Erf(),
    "sigmoid": ew.Sigmoid(),
    "relu": ew.Relu(),
    "silu": ew.Silu(),
    "gelu": ew.Gelu(),
    "softplus": ew.Softplus(),
    "square": ew.Square(),
}
POSITIVE_ONLY = {"log": ew.Log(), "sqrt": ew.Sqrt(), "rsqrt": ew.Rsqrt()}
BINARY = {
    "add": ew.Add(),
    "sub": ew.Sub(),
    "mul": ew.Mul(),
    "div": ew.Div(),
    "maximum": ew.Maximum(),
    "minimum": ew.Minimum(),
}

SMOOTH: dict[str, Graph] = {
    **{name: graph_of(lambda b, x, op=op: b.apply(op, x), (3, 5)) for name, op in UNARY.items()},
    **{name: graph_of(lambda b, x, op=op: b.apply(op, b.sigmoid(x)), (3, 5)) for name, op in POSITIVE_ONLY.items()},
    **{name: graph_of(lambda b, x, y, op=op: b.apply(op, x, y), (2, 1, 5), (3, 1)) for name, op in BINARY.items()},
    "batch_norm": graph_of(lambda b, x: b.batch_norm(x, "norm"), (2, 3, 5)),
    "pow": graph_of(lambda b, x, y: b.apply(ew.Pow(), b.sigmoid(x), y), (3, 5), (5,)),
    "where": graph_of(lambda b, x, y: b.where(b.less(x, y), x, 2.0), (3, 5), (5,)),
    "sum": graph_of(lambda b, x: b.sum(x, 0, -1), (3, 5, 2)),
    "mean_keepdims": graph_of(lambda b, x: b.mean(x, 1, keepdims=True), (3, 5, 2)),
    "max": graph_of(lambda b, x: b.max(x, -1, 0), (3, 5, 2)),
    "cumsum": graph_of(lambda b, x: b.cumsum(x, -2), (3, 5, 2)),
    "reshape": graph_of(lambda b, x: b.reshape(b.transpose(x, 1, 0), 2, -1), (4, 5)),
    "transpose": graph_of(lambda b, x: b.transpose(x, 2, 0, 1), (3, 5, 2)),
    "slice": graph_of(lambda b, x: b.slice(x, 1, 1, 5, 3), (3, 5, 2)),
    "concat": graph_of(lambda b, x, y: b.concat(-2, x, y, x), (3, 1, 2), (3, 4, 2)),
    "pad": graph_of(lambda b, x: b.pad(b.pad(x, 0, 2, 0, -1.5), 2, 1, 3), (3, 1, 2)),
    "broadcast": graph_of(lambda b, x: b.broadcast(x, 4, 3, 2), (3, 1)),
    "take_rows": graph_of(lambda b, x, i: b.take(x, i), (3, 5), (2, 4), dtypes="fi"),
    "take_vectors": graph_of(lambda b, x, i: b.take(x, i), (3,), (2, 4), dtypes="fi"),
    "take_matrices": graph_of(lambda b, x, i: b.take(x, i), (3, 5, 2), (), dtypes="fi"),
    "fft": graph_of(lambda b, x, y: b.concat(0, *b.fft(x, y, 1)), (2, 5, 3), (2, 5, 3)),
    "ifft": graph_of(lambda b, x, y: b.concat(0, *b.fft(x, y, -1, inverse=True)), (2, 6), (2, 6)),
    "rfft": graph_of(lambda b, x: b.concat(0, *b.rfft(x, -2)), (2, 5, 3)),
    "rfft_even": graph_of(lambda b, x: b.concat(0, *b.rfft(x, 1)), (2, 6)),
    "irfft": graph_of(lambda b, x, y: b.irfft(x, y, 1, 5), (2, 3, 3), (2, 3, 3)),
    "irfft_even": graph_of(lambda b, x, y: b.irfft(x, y, -1, 6), (2, 4), (2, 4)),
    "long_conv": graph_of(lambda b, x, h: b.long_conv(x, h), (2, 7, 3), (4, 3)),
    "gather": graph_of(lambda b, x, i: b.gather(x, i, 1), (2, 4, 3), (2, 5, 3), dtypes="fi"),
    "gather_rows": graph_of(lambda b, x, i: b.gather(x, i, -2), (2, 4, 3), (2, 5, 1), dtypes="fi"),
    "scatter_add": graph_of(lambda b, x, i, u: b.scatter_add(x, i, u, 0), (4, 3), (5, 3), (5, 3), dtypes="fif"),
    "scatter_add_rows": graph_of(
        lambda b, x, i, u: b.scatter_add(x, i, u, -2), (2, 4, 3), (1, 5, 1), (2, 5, 3), dtypes="fif"
    ),
    "top_k": graph_of(lambda b, x: b.top_k(x, 3)[0], (2, 7)),
    "sort": graph_of(lambda b, x: b.sort(x)[0], (2, 7)),
    "dynamic_update": graph_of(
        lambda b, x, y, i: b.dynamic_update(x, y, i, -2), (2, 7, 3), (2, 4, 3), (), dtypes="ffi"
    ),
    "matmul": graph_of(lambda b, x, y: b.matmul(x, y), (2, 1, 3, 5), (4, 5, 7)),
    "matmul_transposed": graph_of(
        lambda b, x, y: b.matmul(x, y, transpose_a=True, transpose_b=True), (2, 5, 3), (7, 5)
    ),
    "softmax": graph_of(lambda b, x: b.softmax(x), (3, 7)),
    "softmax_first_axis": graph_of(lambda b, x: b.softmax(x, 0), (3, 7)),
    "layer_norm": graph_of(lambda b, x, s, o: b.layer_norm(x, s, o), (2, 3, 7), (7,), (7,)),
    "layer_norm_scale": graph_of(lambda b, x, s: b.layer_norm(x, s, epsilon=0.1), (3, 7), (7,)),
    "layer_norm_plain": graph_of(lambda b, x: b.layer_norm(x), (7,)),
    "rms_norm": graph_of(lambda b, x, s: b.rms_norm(x, s), (2, 3, 7), (7,)),
    "rms_norm_plain": graph_of(lambda b, x: b.rms_norm(x, epsilon=0.1), (3, 7)),
    "conv_1d_causal": graph_of(lambda b, x, w: b.conv(x, w, padding=((3, 0),), groups=5), (2, 7, 5), (4, 1, 5)),
    "conv_1d_dilated": graph_of(lambda b, x, w: b.conv(x, w, dilation=(2,), padding=((1, 2),)), (2, 7, 3), (3, 3, 5)),
    "conv_2d_grouped": graph_of(
        lambda b, x, w: b.conv(x, w, strides=(2, 1), padding=((1, 0), (0, 2)), groups=2), (1, 5, 4, 6), (3, 2, 3, 4)
    ),
    "conv_3d": graph_of(lambda b, x, w: b.conv(x, w), (1, 3, 4, 3, 2), (2, 1, 3, 2, 3)),
    "rope": graph_of(lambda b, x: b.rope(x, base=100.0), (2, 5, 3, 6)),
    "rope_offset": graph_of(lambda b, x, i: b.rope(x, offset=i), (2, 5, 1, 2), (), dtypes="fi"),
    "linear_scan": graph_of(lambda b, x, y: b.linear_scan(b.sigmoid(x), y), (2, 7, 3, 2), (2, 7, 3, 2)),
    "linear_scan_one_step": graph_of(lambda b, x, y: b.linear_scan(x, y), (2, 1), (2, 1)),
}
WINDOWS = {
    "1d": ((2, 7, 3), (3,), (1,), ((1, 1),), False),
    "causal": ((2, 7, 3), (3,), (1,), ((2, 0),), True),
    "2d": ((1, 5, 6, 3), (2, 3), (2, 1), ((0, 1), (1, 2)), False),
    "3d": ((1, 3, 4, 3, 2), (2, 2, 1), (1, 2, 1), ((0, 0), (1, 0), (0, 0)), True),
}


def pooling(kind: Literal["average", "max"], name: str) -> Graph:
    """A pooling over one of the windows."""
    shape, *rest = WINDOWS[name]
    return graph_of(lambda b, x: b.pool(x, Pool(kind, *rest)), shape)


POOLS = {
    **{f"average_pool_{name}": pooling("average", name) for name in WINDOWS},
    **{f"max_pool_{name}": pooling("max", name) for name in WINDOWS},
}
DISCRETE = {
    "lt": graph_of(lambda b, x, y: b.less(x, y), (3, 5), (5,)),
    "le": graph_of(lambda b, x, y: b.less_equal(x, y), (3, 5), (5,)),
    "eq": graph_of(lambda b, x, y: b.equal(x, y), (3, 5), (5,)),
    "int_arithmetic": graph_of(lambda b, x, y: b.maximum(x + y, x * y), (3, 5), (5,), dtypes="ii"),
    "int_comparison": graph_of(lambda b, x, y: b.equal(x, y), (3, 5), (5,), dtypes="ii"),
    "cast_to_int": graph_of(lambda b, x: b.cast(x * 3.0, "int32"), (3, 5)),
    "cast_to_bool": graph_of(lambda b, x: b.cast(x, "bool"), (3, 5), dtypes="i"),
    "cast_from_bool": graph_of(lambda b, x: b.cast(x, "float32"), (3, 5), dtypes="b"),
    "where_input": graph_of(lambda b, c, x: b.where(c, x, -1.0), (3, 1), (3, 5), dtypes="bf"),
    "top_k_positions": graph_of(lambda b, x: b.top_k(b.cast(x, "float32"), 4)[1], (3, 9), dtypes="i"),
    "sort_positions": graph_of(lambda b, x: b.sort(b.cast(x, "float32"))[1], (3, 9), dtypes="i"),
    "constant": graph_of(lambda b, x: x * b.constant(np.arange(15).reshape(3, 5) / 7), (3, 5)),
    "int_constant": graph_of(lambda b, x: x + b.constant(np.arange(5)), (3, 5), dtypes="i"),
}


@pytest.mark.parametrize("name", [*SMOOTH, *POOLS, *DISCRETE])
def test_row_equals_numpy(name: str) -> None:
    """Each operation gives in torch what it gives in numpy, on odd shapes."""
    check((SMOOTH | POOLS | DISCRETE)[name])


@pytest.mark.parametrize("name", [*SMOOTH, *POOLS])
def test_row_is_differentiable(name: str) -> None:
    """Gradients match finite differences."""
    check_gradient((SMOOTH | POOLS)[name])


def test_cases_cover_every_row() -> None:
    """No row of the table is left without a case."""
    graphs = (*SMOOTH.values(), *POOLS.values(), *DISCRETE.values(), *attention_graphs(3, 5, 95), outer_scan("none", 3))
    seen = {type(node.op) for graph in graphs for node in graph.nodes}
    assert [op.name for op in TORCH if op not in seen] == []


def outer_scan(decay: Decay, steps: int, *, form: Form = "auto", state: bool = False, chunk: int = 16) -> Graph:
    """A recurrence with all its outputs; decays are below one."""
    b = Builder()
    batch, heads, keys, values = 2, 3, 4, 5
    q, k = b.input("q", (batch, steps, heads, keys)), b.input("k", (batch, steps, heads, keys))
    v = b.input("v", (batch, steps, heads, values))
    shapes = {"none": (), "head": (q.shape[:3],), "key": (q.shape,), "state": (v.shape, (heads, keys, values))}[decay]
    gates = [b.softplus(b.input(f"gate{i}", shape)) * (-1.0 if i == 0 else 1.0) for i, shape in enumerate(shapes)]
    initial = b.input("state", (batch, heads, keys, values)) if state else None
    y, last = b.outer_scan(q, k, v, *gates, decay=decay, scale=0.5, state=initial, form=form, chunk=chunk)
    return b.build(y=y, last=last)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_outer_scan_equals_numpy(decay: Decay, form: Form) -> None:
    """Every form of every recurrence steps as its definition does, with and without an initial state.

    One step, less than a chunk, whole chunks, and chunks with a rest.
    """
    for steps, chunk, state in itertools.product((1, 7, 32, 37), (1, 16), (False, True)):
        check(outer_scan(decay, steps, form=form, state=state, chunk=chunk))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_outer_scan_is_differentiable(decay: Decay, form: Form, state: bool) -> None:
    """Gradients of queries, keys, values, decays and the initial state match finite differences, over a short chunk."""
    check_gradient(outer_scan(decay, 5, form=form, state=state, chunk=2))


def test_outer_scan_survives_strong_decay() -> None:
    """Decays that vanish in float32 within a chunk give neither infinities nor NaN, forward or backward."""
    decays: tuple[Decay, ...] = ("head", "key")
    for decay, form in itertools.product(decays, FORMS):
        graph = outer_scan(decay, 37, form=form)
        inputs = {name: torch.from_numpy(array).float().requires_grad_() for name, array in draw(graph).items()}
        inputs["gate0"] = (inputs["gate0"].detach() + 100.0).requires_grad_()
        outputs = to_module(graph)(**inputs)
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
        assert all(torch.isfinite(output).all() for output in outputs.values())
        assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in inputs.values())


def attention_graphs(queries: int, keys: int, every: int = 1) -> list[Graph]:
    """Combinations of masks, positions and groups at one length: all 192, or each `every`-th, coprime to 192."""
    graphs = []
    combinations = itertools.product(
        (False, True), (None, 1, 3), (False, True), (1, 2), (False, True), (None, (), (keys,), (4, 1, keys))
    )
    for causal, window, alibi, group, offset, bias in itertools.islice(combinations, 0, None, every):
        b = Builder()
        heads = 4
        q = b.input("q", (2, queries, heads, 3))
        k, v = b.input("k", (2, keys, heads // group, 3)), b.input("v", (2, keys, heads // group, 5))
        y = b.attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            alibi=(0.5, 0.25, 0.0, 1.0) if alibi else None,
            offset=b.input("offset", (), "int32") if offset else None,
            bias=None if bias is None else b.input("bias", bias),
        )
        graphs.append(b.build(y=y))
    return graphs


@pytest.mark.parametrize(("queries", "keys", "every"), [(1, 1, 7), (1, 5, 5), (5, 5, 5), (3, 7, 1), (7, 3, 5)])
def test_attention_equals_numpy(queries: int, keys: int, every: int) -> None:
    """Causality, windows, slopes, grouped heads, run-time offsets and biases, alone and together."""
    for graph in attention_graphs(queries, keys, every):
        for position in (0, 2, keys + 4) if "offset" in graph.inputs else (0,):
            inputs = draw(graph)
            if "offset" in inputs:
                inputs["offset"] = np.array(position, np.int32)
            check(graph, inputs)


def test_attention_is_differentiable() -> None:
    """Gradients match finite differences under masks, slopes, offsets and biases, queries that see no key included."""
    for graph in (*attention_graphs(3, 5, 7), *attention_graphs(5, 3, 13)):
        check_gradient(graph)


def test_attention_query_without_keys_gives_zeros() -> None:
    """More queries than keys: the first ones stand before every key, and get zeros and finite gradients."""
    graph = graph_of(lambda b, q, k, v: b.attention(q, k, v, causal=True), (1, 5, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4))
    inputs = {name: torch.from_numpy(array).requires_grad_() for name, array in draw(graph).items()}
    y = to_module(graph, dtype=torch.float64)(**inputs)["y"]
    y.square().sum().backward()
    assert torch.equal(y[:, :2], torch.zeros_like(y[:, :2]))
    assert (y[:, 2:] != 0).any()
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in inputs.values())


EXACT = [recipe for op, recipe in random_graphs.RECIPES.items() if op not in (Cast, Compare, TopK)]
"""Operations that stay in one precision: a cast to float32, such as top-k's of positions, rounds in torch alone."""


@settings(max_examples=60)
@given(graph=random_graphs.graphs(recipes=EXACT))
def test_random_graph_equals_numpy(graph: Graph) -> None:
    """Any graph is the same function in torch and in the interpreter, overflow included."""
    inputs, params = random_graphs.draw_values(graph)
    expected = random_graphs.run(graph, inputs, params)
    found = in_torch(to_module(graph, params, dtype=torch.float64).eval(), inputs)
    for name, array in expected.items():
        finite = np.abs(array[np.isfinite(array)])
        scale = max(float(finite.max()) if finite.size else 1.0, 1.0)
        np.testing.assert_allclose(found[name], array, rtol=1e-8, atol=1e-8 * scale)  # pow and rsqrt amplify rounding


def linear_model() -> Graph:
    """Two layers with a shared scale, a mask made of constants and rotary positions."""
    b = Builder()
    x = b.input("x", (2, 5, 8))
    axes = ((Axis("d_model", 8),), (Axis("hidden", 8),))
    for layer in range(2):
        with b.scope(f"layers.{layer}"), b.scope("mixer"):
            h = b.matmul(x, b.parameter("w", axes))
            q = b.rope(b.split_heads(h, 2))
            x = x + b.merge_heads(b.attention(q, q, q, causal=True, window=2)) * b.constant(0.5)
    return b.build(y=b.rms_norm(x, b.parameter("final.scale", ((Axis("d_model", 8),),), "constant(1)")))


def test_module_keeps_parameter_names_and_values() -> None:
    """The state dict has the graph's names, in order, and export gives the values back; tables are not in it."""
    graph = linear_model()
    params = initialize(graph, 3)
    module = to_module(graph, params)
    assert list(module.state_dict()) == list(graph.parameters) == [*params]
    assert {name for name, _ in module.named_parameters()} == set(graph.parameters)
    exported = module.export_params()
    assert all(np.array_equal(exported[name], params[name]) for name in params)
    exported["final.scale"][:] = 7.0
    assert module.export_params()["final.scale"][0] == 1.0, "export must copy"


def test_module_draws_parameters_from_the_seed() -> None:
    """Without values, a seed gives the same parameters each time, and other seeds others."""
    graph = linear_model()
    first, again, other = (to_module(graph, seed=seed).export_params() for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["layers.0.mixer.w"], other["layers.0.mixer.w"])


def test_module_copies_are_independent() -> None:
    """A deep copy computes the same, and training it leaves the original alone."""
    graph = linear_model()
    module = to_module(graph, seed=0)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 5, 8)
    assert torch.equal(module(x=x)["y"], twin(x=x)["y"])
    before = module(x=x)["y"].detach().clone()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-0.5)
    assert not torch.allclose(twin(x=x)["y"], before)
    assert torch.equal(module(x=x)["y"], before)


def test_module_turns_double() -> None:
    """`.double()` converts parameters, constants and tables alike."""
    graph = linear_model()
    params = initialize(graph, 0)
    inputs = draw(graph)
    found = in_torch(to_module(graph, params).double(), inputs)["y"]
    assert found.dtype == np.float64
    # Tables and the parameters were rounded to float32 before they were widened.
    np.testing.assert_allclose(found, evaluate(graph, inputs, params)["y"], rtol=0, atol=1e-6)


def test_module_loads_what_it_saved() -> None:
    """A state dict moves weights to another module of the same graph, and to one of another length."""
    graph = linear_model()
    source, target = to_module(graph, seed=0), to_module(graph, seed=1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(source(x=x)["y"], target(x=x)["y"])


def test_missing_parameter_is_named() -> None:
    """A missing value and one of another shape are errors that name the parameter."""
    graph = linear_model()
    params = initialize(graph, 0)
    with pytest.raises(GraphError, match="missing") as missing:
        to_module(graph, {name: array for name, array in params.items() if name != "layers.1.mixer.w"})
    assert missing.value.where == "layers.1.mixer.w"
    with pytest.raises(GraphError, match="another shape") as wrong:
        to_module(graph, params | {"final.scale": np.ones(9, np.float32)})
    assert (wrong.value.expected, wrong.value.found) == ("(8,)", "(9,)")


def test_component_node_is_refused() -> None:
    """A graph with a component left in it says so."""
    b = Builder()
    x = b.input("x", (1, 2, 3))
    graph = b.build(y=b.component("token_mixer", "identity", (), x))
    with pytest.raises(GraphError, match="no torch row") as error:
        to_module(graph)
    assert "expand" in str(error.value)


def test_dead_nodes_are_not_computed() -> None:
    """What no output needs is left out, though its inputs may still be given."""
    b = Builder()
    x, unused = b.input("x", (2, 3)), b.input("unused", (2, 3))
    b.log(unused)
    module = to_module(b.build(y=b.exp(x)))
    assert module(x=torch.zeros(2, 3), unused=torch.zeros(2, 3))["y"].sum() == 6


def test_matmul_rounds_its_operands():
    """With a precision, torch multiplies the same rounded operands as numpy, and the sums stay wide."""
    graph = LowerPrecision("bfloat16")(
        graph_of(lambda b, x: b.matmul(x, b.parameter("w", ((Axis("a", 5),), (Axis("b", 7),)))), (2, 3, 5))
    )
    assert '{precision="bfloat16"}' in print_graph(graph)
    check(graph)


def test_batch_norm_trains_as_torch_does():
    """In training the batch's own statistics norm it and move the running ones; neither counts as trained."""
    b = Builder()
    x = b.input("x", (4, 5, 3))
    graph = b.build(y=b.batch_norm(x, "norm"))
    module, torch_norm = to_module(graph, seed=0), torch.nn.BatchNorm1d(3)
    given = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)) * 2 + 1
    for _ in range(3):
        y, expected = module(x=given)["y"], torch_norm(given.reshape(-1, 3)).reshape(4, 5, 3)
        assert torch.allclose(y, expected, atol=1e-6)  # the same sums in float32
    values = module.export_params()
    assert torch_norm.running_mean is not None
    assert torch_norm.running_var is not None
    assert np.allclose(values["norm_mean"], torch_norm.running_mean.numpy(), atol=1e-6)
    assert np.allclose(values["norm_variance"], torch_norm.running_var.numpy(), atol=1e-6)
    assert {name for name, _ in module.named_parameters()} == {"norm_scale", "norm_bias"}
    assert torch.allclose(
        module.eval()(x=given)["y"], torch_norm.eval()(given.reshape(-1, 3)).reshape(4, 5, 3), atol=1e-6
    )
