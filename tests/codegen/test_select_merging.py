"""Products that are computed together, and state spaces with what stands around them: before, a graph; after, keys."""

from __future__ import annotations

import numpy as np

from codegen import targets
from codegen.compile import compile_graph
from ir.builder import Builder, Tensor
from ir.initializers import initialize
from tests.codegen.test_select import selected, weight

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


def test_product_that_another_kernel_reads_stays_apart() -> None:
    """A norm of the queries reads whole rows; keys and values are still merged."""

    def normed(b: Builder, x: Tensor) -> Tensor:
        return b.attention(b.rms_norm(heads(b, x, "q")), heads(b, x, "k"), heads(b, x, "v"))

    found = selected(normed)
    assert found[0] == "gemm(m=6,n=8,k=8)"
    assert "gemm(m=6,n=16,k=8)" in found
    assert found[-1].endswith("k_view=16+0,v_view=16+8)")


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
    q, k, v, g = (b.reshape(t, 2, 3, 1, t.shape[-1]) for t in (c, k, dt * x, dt))
    o, _ = b.outer_scan(q, k, v, g, rate, decay="state")
    y = b.reshape(o, *x.shape) + x * weight(b, "skip", 8)
    return y * b.silu(b.matmul(x, weight(b, "gate", 8, 8))) if gated else y


def test_state_space_takes_its_input_scale_skip_and_gate() -> None:
    """Three kernels remain around the scan: the narrow products, the step size, and the gate."""
    assert selected(state_space) == [
        "gemm(m=6,n=8,k=8)",
        "gemm(m=6,n=8,k=2,bias,activation=softplus,a_view=8+6)",
        "gemm(m=6,n=8,k=8,activation=silu)",
        "selective_scan(batch=2,t=3,channels=8,state=3,decaying,scaled_input,skip,gate=identity,c_view=8+0,b_view=8+3)",
    ]
    assert selected(lambda b, x: state_space(b, x, gated=False))[-1].endswith(
        "scaled_input,skip,c_view=8+0,b_view=8+3)"
    )


def test_gate_that_needs_the_scan_is_left_outside() -> None:
    """y * f(y) multiplies a scan's output by what was made of it."""

    def own_gate(b: Builder, x: Tensor) -> Tensor:
        y = state_space(b, x, gated=False)
        return y * b.sigmoid(y)

    assert "gate" not in next(key for key in selected(own_gate) if key.startswith("selective_scan"))


def test_merged_models_compute_the_same() -> None:
    """Windows and fused gates pass the compiler's own comparison with torch."""
    for make in (state_space, lambda b, x: b.attention(*(b.rope(heads(b, x, n)) for n in "qk"), heads(b, x, "v"))):
        b = Builder()
        graph = b.build(y=make(b, b.input("x", X)))
        compiled = compile_graph(graph, initialize(graph, 0), targets.get("cpu", threads=1))
        assert compiled.verification_error < 1e-5
        assert np.isfinite(compiled.expected_outputs["y"]).all()
