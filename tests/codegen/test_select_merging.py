"""Products that are computed together, and state spaces with what stands around them: before, a graph; after, keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen import targets
from codegen.container import relative_error
from ir.builder import Builder, Tensor
from ir.initializers import initialize
from ir.interpret import evaluate
from tests.codegen.building import run_graph
from tests.codegen.test_select import selected, weight

TARGET = targets.get("cpu", threads=1)

X = (2, 3, 8)


def heads(b: Builder, x: Tensor, name: str, width: int = 8, *, bias: bool = False) -> Tensor:
    """A product with a weight, in two heads."""
    y = b.matmul(x, weight(b, name, 8, width))
    return b.split_heads(y + weight(b, f"{name}_bias", width) if bias else y, 2)


def test_queries_keys_and_values_are_one_product() -> None:
    """Attention reads windows of it; biases are merged too."""
    for bias in (False, True):
        found = selected(lambda b, x, bias=bias: b.attention(*(heads(b, x, name, bias=bias) for name in "qkv")))
        assert found == [
            f"gemm(m=6,n=24,k=8{',bias' * bias})",
            "attention(batch=2,q_len=3,kv_len=3,heads=2,kv_heads=2,head_dim=4,value_dim=4,scale=0.5,"
            "q_view=24+0,k_view=24+8,v_view=24+16)",
        ]


def test_rotated_heads_are_read_from_the_window() -> None:
    """The rotation stands between the product and attention; values go there directly."""

    def rotated(b: Builder, x: Tensor) -> Tensor:
        return b.attention(b.rope(heads(b, x, "q")), b.rope(heads(b, x, "k")), heads(b, x, "v"))

    assert [key.split("(")[0] for key in selected(rotated)] == ["gemm", "rope", "rope", "attention"]


def test_norms_and_chains_read_windows() -> None:
    """A norm of each head finds its rows side by side in a row of the buffer; a chain begins with a slice."""

    def normed(b: Builder, x: Tensor) -> Tensor:
        return b.attention(b.rms_norm(heads(b, x, "q")), heads(b, x, "k"), heads(b, x, "v"))

    found = selected(normed)
    assert found[:2] == [
        "gemm(m=6,n=24,k=8)",
        "norm(rows=12,width=4,kind=rms_norm,epsilon=1e-05,heads=2,x_view=24+0)",
    ]
    assert found[2].endswith("k_view=24+8,v_view=24+16)")

    def chained(b: Builder, x: Tensor) -> Tensor:
        h, z = b.matmul(x, weight(b, "h", 8, 4)), b.matmul(x, weight(b, "z", 8, 6))
        return b.sum(b.exp(h), -1, keepdims=True) * z

    assert selected(chained) == ["gemm(m=6,n=10,k=8)", "fused(slice-exp-sum)", "fused(slice-mul)"]


def test_decode_step_projects_once() -> None:
    """At a run-time position the rotation and the cache's update are chains, which read windows too."""

    def step(b: Builder, x: Tensor) -> tuple[Tensor, ...]:
        position = b.input("position", (), "int32")
        q, k, v = (heads(b, x, name) for name in "qkv")
        q, k = b.rope(q, offset=position), b.rope(k, offset=position)
        keys = b.dynamic_update(b.input("state.k", (2, 9, 2, 4)), k, position, axis=1)
        values = b.dynamic_update(b.input("state.v", (2, 9, 2, 4)), v, position, axis=1)
        return b.attention(q, keys, values, causal=True, offset=position), keys, values

    found = [key.split("(")[0] for key in selected(step, (2, 1, 8))]
    assert found.count("gemm") == 1
    assert len(found) == 6


def test_product_whose_reader_takes_no_window_stays_apart() -> None:
    """A run-time product reads whole operands, and heads that join tokens are no columns of a row."""

    def scores(b: Builder, x: Tensor) -> Tensor:
        return b.matmul(b.matmul(x, weight(b, "q", 8, 8)), b.matmul(x, weight(b, "k", 8, 8)), transpose_b=True)

    assert [key for key in selected(scores) if key.startswith("gemm")] == ["gemm(m=6,n=8,k=8)"] * 2

    def joined(b: Builder, x: Tensor) -> Tensor:
        q, k, v = (b.reshape(b.matmul(x, weight(b, name, 8, 8)), 2, 2, 2, 8) for name in "qkv")
        return b.attention(q, k, v)

    assert [key for key in selected(joined, (2, 4, 8)) if key.startswith("gemm")] == ["gemm(m=8,n=8,k=8)"] * 3


def test_output_of_the_model_is_not_merged() -> None:
    """A value that somebody outside reads keeps memory of its own."""

    def shown(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (heads(b, x, name) for name in "qkv")
        return b.attention(q, k, v), k

    assert sorted(key for key in selected(shown) if key.startswith("gemm")) == [
        "gemm(m=6,n=16,k=8)",
        "gemm(m=6,n=8,k=8)",
    ]


def test_gates_of_another_width_and_biases_of_some_stay_apart() -> None:
    """Products with a bias are merged with their like only."""

    def mixed(b: Builder, x: Tensor) -> Tensor:
        return b.attention(heads(b, x, "q", bias=True), heads(b, x, "k"), heads(b, x, "v"))

    assert [key for key in selected(mixed) if key.startswith("gemm")] == [
        "gemm(m=6,n=8,k=8,bias)",
        "gemm(m=6,n=16,k=8)",
    ]


def state_space(b: Builder, x: Tensor, *, gated: bool = True) -> Tensor:
    """The scan of Mamba with its skip and gate."""
    c, k, low = (b.matmul(x, weight(b, name, 8, size)) for name, size in (("c", 3), ("b", 3), ("down", 2)))
    dt = b.softplus(b.matmul(low, weight(b, "up", 2, 8)) + weight(b, "dt_bias", 8))
    rate = b.reshape(-b.exp(weight(b, "a_log", 3, 8)), 1, 3, 8)
    q, k, v, g = (b.reshape(t, *x.shape[:2], 1, t.shape[-1]) for t in (c, k, dt * x, dt))
    o, _ = b.outer_scan(q, k, v, g, rate, decay="state")
    y = b.reshape(o, *x.shape) + x * weight(b, "skip", 8)
    return y * b.silu(b.matmul(x, weight(b, "gate", 8, 8))) if gated else y


def test_state_space_takes_its_input_scale_skip_and_gate() -> None:
    """Two kernels remain before the scan: all products of its input at once, and the step size."""
    assert selected(state_space) == [
        "gemm(m=6,n=16,k=8)",
        "gemm(m=6,n=8,k=2,bias,activation=softplus,a_view=16+6)",
        "selective_scan(batch=2,t=3,channels=8,state=3,decaying,scaled_input,skip,gate=silu,"
        "c_view=16+0,b_view=16+3,z_view=16+8)",
    ]
    assert selected(lambda b, x: state_space(b, x, gated=False))[-1].endswith(
        "scaled_input,skip,c_view=8+0,b_view=8+3)"
    )


def matrix_state(b: Builder, x: Tensor) -> Tensor:
    """Retention: a constant decay of each head, normed and gated heads, and a product back."""
    q, k, v = (heads(b, x, name) for name in "qkv")
    log_decay = b.broadcast(b.constant(np.array([-0.5, -0.25], np.float32)), *q.shape[:3])
    o, _ = b.outer_scan(q, k, v, log_decay, decay="head")
    normed = b.merge_heads(b.rms_norm(o, weight(b, "scale", 4)))
    return b.matmul(normed * b.silu(b.matmul(x, weight(b, "gate", 8, 8))), weight(b, "out", 8, 8))


def test_recurrence_takes_its_constant_decay_and_the_norm_its_gate() -> None:
    """One product before the scan; the norm of the heads is multiplied by the gate in its pass."""
    assert selected(matrix_state) == [
        "gemm(m=6,n=32,k=8)",
        "outer_scan(batch=2,t=3,heads=2,dk=4,dv=4,decay=head,constant_log_decay=-0.5/-0.25,"
        "q_view=32+0,k_view=32+8,v_view=32+16)",
        "norm(rows=12,width=4,kind=rms_norm,epsilon=1e-05,scale,gate=silu,heads=2,gate_view=32+24)",
        "gemm(m=6,n=8,k=8)",
    ]


def test_large_gate_is_a_product_of_its_own() -> None:
    """It is read last: merged, it would hold the memory of queries, keys and values until then."""
    found = selected(matrix_state, (2, 300, 8))
    assert found[0] == "gemm(m=600,n=24,k=8)"
    assert "gemm(m=600,n=8,k=8)" in found
    assert next(key for key in found if key.startswith("norm")).endswith("gate=silu)")


def test_norm_of_a_value_that_the_gate_needs_takes_no_gate() -> None:
    """norm(x) * f(norm(x)) cannot be one pass."""

    def own_gate(b: Builder, x: Tensor) -> Tensor:
        y = b.rms_norm(x)
        return y * b.sigmoid(b.matmul(y, weight(b, "w", 8, 8)))

    assert not any("gate" in key for key in selected(own_gate))


def test_gate_that_needs_the_scan_is_left_outside() -> None:
    """y * f(y) multiplies a scan's output by what was made of it."""

    def own_gate(b: Builder, x: Tensor) -> Tensor:
        y = state_space(b, x, gated=False)
        return y * b.sigmoid(y)

    assert "gate" not in next(key for key in selected(own_gate) if key.startswith("selective_scan"))


def windows_everywhere(b: Builder, x: Tensor) -> Tensor:
    """Every kind of reader of a window: a norm, two rotations, attention, a chain, a gate, a second product."""
    q, k, v = (heads(b, x, name, bias=True) for name in "qkv")
    mixed = b.merge_heads(b.attention(b.rope(b.rms_norm(q)), b.rope(k), v, causal=True))
    low, factor = b.matmul(x, weight(b, "down", 8, 3)), b.exp(b.matmul(x, weight(b, "factor", 8, 8)) * 0.1)
    with b.scope("recurrent"):
        recurrent = matrix_state(b, b.tanh(x))
    return mixed * factor + b.matmul(low, weight(b, "up", 3, 8)) + recurrent


@pytest.mark.parametrize("make", [state_space, windows_everywhere], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", [X, (1, 1, 8), (1, 700, 8)], ids=str)
def test_merged_models_compute_the_same(
    make: Callable[[Builder, Tensor], Tensor], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Windows and fused gates give what the interpreter computes in float64."""
    b = Builder()
    graph = b.build(y=make(b, b.input("x", shape)))
    params = {name: array.astype(np.float32) for name, array in initialize(graph, 0).items()}
    inputs = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    _, outputs = run_graph(graph, params, TARGET, tmp_path, inputs)
    assert relative_error(outputs["y"], evaluate(graph, inputs, params)["y"]) < 1e-5
