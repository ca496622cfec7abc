"""Kernels in CUDA C++ against float64: the text that the CUDA compiler gets, run on the CPU by an emulation."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest

from codegen.gpu.cuda import generators, kernels, products
from codegen.kernels.base import storage_dtype
from codegen.kernels.gemm import GemmKernel
from codegen.targets.base import Gpu
from tests.codegen.cuda_emulator import GateStrides, Strides, TensorMap, from_bits, run, to_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed here; the emulation needs it")

# Half a unit of the last place of what is stored, and the same again for weights and states rounded on the way.
TOLERANCE = {"bfloat16": 1.2e-2, "float16": 1.5e-3}


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Random 16-bit numbers."""
    return to_bits(rng.standard_normal(shape) * scale, dtype)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


ACTIVATE = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "out", "extras", "tile"),
    [
        pytest.param((128, 128, 32), "bfloat16", "identity", None, False, 0, marks=pytest.mark.slow),
        pytest.param((130, 136, 72), "bfloat16", "gelu", None, True, 0, marks=pytest.mark.slow),
        ((70, 40, 136), "float16", "identity", None, True, 2),
        pytest.param((1, 8, 8), "float16", "silu", "float32", True, 1, marks=pytest.mark.slow),
        pytest.param((200, 264, 328), "float16", "relu", None, True, 1, marks=pytest.mark.slow),
    ],
)
def test_gemm_equals_float64(
    shape: tuple[int, int, int], dtype: str, activation: str, out: str | None, extras: bool, tile: int
) -> None:
    """Whole tiles, ragged edges, a single row, each size of tile; with and without bias and residual."""
    rng = np.random.default_rng(0)
    rows, columns, depth = shape
    a, w = draw(rng, (rows, depth), dtype), draw(rng, (columns, depth), dtype, depth**-0.5)
    bias = rng.standard_normal(columns).astype(np.float32) if extras else None
    wide = out == "float32"
    other = rng.standard_normal((rows, columns))
    residual = (other.astype(np.float32) if wide else to_bits(other, dtype)) if extras else None
    c = np.zeros((rows, columns), np.float32 if wide else np.uint16)
    chosen = kernels.GEMM_TILES[tile]
    kernel = kernels.gemm(dtype, activation=activation, out=out, tile=chosen)
    run(kernel, chosen.grid(rows, columns), a, w, bias, residual, c, rows, columns, depth)
    expected = from_bits(a, dtype) @ from_bits(w, dtype).T + (0.0 if bias is None else bias)
    expected = ACTIVATE[activation](expected)
    if residual is not None:
        expected += residual if wide else from_bits(residual, dtype)
    # float32 sums of 328 products where the output is not rounded
    assert error(c if wide else from_bits(c, dtype), expected) < (2e-6 if wide else TOLERANCE[dtype])


@pytest.mark.parametrize(
    "kernel",
    [
        GemmKernel(130, 136, 72, bias=True, activation="gelu", precision="bfloat16", a_dtype="bfloat16"),
        pytest.param(
            GemmKernel(16, 8, 8, residual=True, precision="bfloat16", a_dtype="bfloat16"), marks=pytest.mark.slow
        ),
        pytest.param(
            GemmKernel(
                64, 40, 24, bias=True, activation="silu", precision="bfloat16", a_dtype="bfloat16", out_dtype="bfloat16"
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda kernel: kernel.key,
)
def test_products_of_models_equal_their_meaning(kernel: GemmKernel) -> None:
    """The entry with its sizes fixed, on operands as they are packed: bias, residual, either type of output."""
    rng = np.random.default_rng(3)
    site, gpu = products.gemm_site(kernel), Gpu("cuda", "sm_90", 1024, 48 * 1024, 32)
    assert generators.find(kernel, gpu) is not None
    a, w = draw(rng, (kernel.m, kernel.k), "bfloat16"), rng.standard_normal((kernel.k, kernel.n), np.float32)
    rest = [rng.standard_normal(kind.shape, np.float32) for kind in kernel.inputs[2:]]
    (out,) = kernel.outputs
    c = np.zeros(out.shape, storage_dtype(out.dtype))
    run(
        site,
        kernels.gemm_tile(kernel.m, kernel.n).grid(kernel.m, kernel.n),
        a,
        products.pack_gemm(kernel, gpu, {}, 1, w),
        *rest,
        c,
    )
    (expected,) = kernel.reference(a, w, *rest)
    rounded = out.dtype == "bfloat16"
    # float32 sums of 72 products, or their rounding to 8 bits
    assert error(from_bits(c, "bfloat16") if rounded else c, expected) < (TOLERANCE["bfloat16"] if rounded else 2e-6)


@pytest.mark.parametrize(
    "kernel",
    [
        GemmKernel(64, 64, 64),  # float32
        GemmKernel(64, 64, 64, precision="bfloat16"),  # rows that are not rounded yet
        GemmKernel(8, 64, 64, precision="bfloat16", a_dtype="bfloat16"),
        GemmKernel(64, 60, 64, precision="bfloat16", a_dtype="bfloat16"),
        GemmKernel(64, 64, 64, gate="silu", precision="bfloat16", a_dtype="bfloat16"),
    ],
    ids=lambda kernel: kernel.key,
)
def test_products_that_do_not_fit_go_the_usual_way(kernel: GemmKernel) -> None:
    """Other types, few rows, ragged columns, gates."""
    assert generators.find(kernel, Gpu("cuda", "sm_90", 1024, 48 * 1024, 32)) is None


@pytest.mark.parametrize(("shape", "blocks"), [((256, 256, 320), 1), ((130, 264, 72), 3)])
def test_hopper_gemm_equals_float64(shape: tuple[int, int, int], blocks: int) -> None:
    """More steps than buffers, several tiles a block, more blocks than tiles, ragged edges."""
    rng = np.random.default_rng(0)
    (rows, columns, depth), dtype = shape, "bfloat16"
    a, w = draw(rng, (rows, depth), dtype), draw(rng, (columns, depth), dtype, depth**-0.5)
    bias, residual = rng.standard_normal(columns).astype(np.float32), draw(rng, (rows, columns), dtype)
    c = np.zeros((rows, columns), np.uint16)
    maps = TensorMap.of(a, (64, 128)), TensorMap.of(w, (64, 256))
    run(kernels.hopper_gemm(dtype), (blocks, 1, 1), *maps, bias, residual, c, rows, columns, depth)
    expected = from_bits(a, dtype) @ from_bits(w, dtype).T + bias + from_bits(residual, dtype)
    assert error(from_bits(c, dtype), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "head", "causal", "dtype", "hopper"),
    [
        pytest.param(128, 128, 1, 1, 64, True, "bfloat16", False, marks=pytest.mark.slow),
        (77, 77, 4, 2, 64, True, "float16", False),
        pytest.param(5, 150, 2, 1, 128, True, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(140, 70, 2, 2, 128, False, "float16", False, marks=pytest.mark.slow),
        (300, 300, 1, 1, 128, True, "bfloat16", True),
        pytest.param(70, 400, 2, 1, 128, False, "float16", True, marks=pytest.mark.slow),
    ],
)
def test_attention_equals_float64(
    queries: int, keys: int, heads: int, key_heads: int, head: int, causal: bool, dtype: str, hopper: bool
) -> None:
    """Lengths that are no multiple of a tile, heads that share keys, queries at the end of a longer context."""
    rng = np.random.default_rng(1)
    q = draw(rng, (2, queries, heads, head), dtype)
    k, v = (draw(rng, (2, keys, key_heads, head), dtype) for _ in range(2))
    o = np.zeros_like(q)
    sizes = (queries, keys, heads, key_heads, head**-0.5)
    strides = [Strides(*(step // 2 for step in array.strides[:3])) for array in (q, k, v, o)]
    grid = kernels.attention_grid(2, heads, queries)
    if hopper:
        maps = [TensorMap.of(x, (64, 1, 128, 1)) for x in (q, k, v)]
        run(kernels.hopper_attention(dtype, causal=causal), grid, *maps, o, *sizes, strides[-1])
    else:
        run(kernels.attention(dtype, head=head, causal=causal), grid, q, k, v, o, *sizes, *strides)
    wide_q, wide_k, wide_v = (from_bits(x, dtype) for x in (q, k, v))
    expected = attention_in_float64(wide_q, wide_k, wide_v, causal)
    assert error(from_bits(o, dtype), expected) < TOLERANCE[dtype]


def attention_in_float64(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """The definition; all of [batch, tokens, heads, features]."""
    (queries, heads, head), (keys, key_heads) = q.shape[1:], k.shape[1:3]
    k, v = (np.repeat(x, heads // key_heads, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * head**-0.5
    if causal:
        scores[:, :, np.arange(keys) > np.arange(queries)[:, None] + keys - queries] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def gla_by_steps(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, scale: float) -> np.ndarray:
    """The recurrence as written, token by token, in float64."""
    state = np.zeros((*k.shape[::2], k.shape[-1], v.shape[-1]))
    outputs = np.empty(v.shape)
    for t in range(k.shape[1]):
        state = np.exp(g[:, t])[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return outputs


@pytest.mark.parametrize(
    ("tokens", "key", "value", "gates", "strength"),
    [
        pytest.param(150, 64, 64, "channel", 0.1, marks=pytest.mark.slow),
        (130, 64, 128, "channel", 30.0),  # exp(-b) of a chunk would be exp(1900)
        pytest.param(100, 64, 64, "head", 1.0, marks=pytest.mark.slow),
        pytest.param(128, 64, 64, "fixed", 0.05, marks=pytest.mark.slow),
    ],
)
def test_gla_equals_the_recurrence(tokens: int, key: int, value: int, gates: str, strength: float) -> None:
    """Mild decay, decay too strong for one reference a chunk, scalar gates, retention; ragged ends."""
    rng = np.random.default_rng(2)
    batch, heads, dtype = 1, 2, "bfloat16"
    q, k = (draw(rng, (batch, tokens, heads, key), dtype) for _ in range(2))
    v = draw(rng, (batch, tokens, heads, value), dtype)
    shape = {"channel": (tokens, heads, key), "head": (tokens, heads, 1), "fixed": (1, heads, 1)}[gates]
    g = (-strength * rng.random((batch, *shape))).astype(np.float32)
    full = np.broadcast_to(g, (batch, tokens, heads, key))
    g_strides = GateStrides(*(step // 4 for step in full.strides))
    o = np.zeros_like(v)
    q_strides, k_strides, v_strides, o_strides = (Strides(*(s // 2 for s in x.strides[:3])) for x in (q, k, v, o))
    states = np.zeros((batch, heads, math.ceil(tokens / 64), key, value), np.uint16)
    scale = key**-0.5
    first, second = kernels.gla_states(dtype, key=key, value=value), kernels.gla_outputs(dtype, key=key, value=value)
    grid = kernels.gla_states_grid(batch, heads, key, value)
    run(first, grid, k, v, g, states, tokens, heads, k_strides, v_strides, g_strides)
    strides = (q_strides, k_strides, v_strides, g_strides, o_strides)
    grid = kernels.gla_outputs_grid(batch, heads, tokens)
    run(second, grid, q, k, v, g, states, o, tokens, heads, scale, *strides)
    wide_q, wide_k, wide_v = (from_bits(x, dtype) for x in (q, k, v))
    expected = gla_by_steps(wide_q, wide_k, wide_v, full.astype(np.float64), scale)
    assert error(from_bits(o, dtype), expected) < TOLERANCE[dtype]
