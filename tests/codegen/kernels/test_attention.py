"""Fused attention and rotary position over masks, biases, head groupings and odd lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import View
from codegen.kernels.rope import RopeKernel
from ir.ops.attention import NORMALISERS, Attention, Normaliser, Rope
from tests.codegen.kernels import checking

SLOPES = (0.5, 0.25, 0.1, 0.01)


def attention(
    batch: int, q_len: int, kv_len: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, **options: Any
) -> AttentionKernel:
    """A kernel with the usual scale."""
    return AttentionKernel(batch, q_len, kv_len, heads, kv_heads, head_dim, value_dim, head_dim**-0.5, **options)


CASES = {
    "full": attention(1, 64, 64, 2, 2, 32, 32),
    "ragged": attention(2, 37, 37, 2, 1, 20, 12),
    "tiny": attention(1, 5, 9, 1, 1, 3, 5),
    "causal_grouped": attention(1, 70, 70, 4, 2, 16, 16, causal=True),
    "causal_alibi": attention(2, 33, 50, 4, 2, 16, 24, causal=True, alibi_slopes=SLOPES),
    "causal_window": attention(1, 100, 100, 1, 1, 16, 16, causal=True, window=7),
    "window": attention(1, 60, 60, 2, 2, 8, 8, window=9),
    "bias_of_heads": attention(1, 49, 49, 4, 4, 32, 32, bias_shape=(1, 4, 49, 49)),
    "bias_of_keys_alibi": attention(2, 20, 31, 4, 4, 32, 32, alibi_slopes=SLOPES, bias_shape=(2, 1, 1, 31)),
    "several_chunks": attention(1, 40, 600, 1, 1, 16, 16),
    "several_chunks_causal": attention(1, 300, 600, 1, 1, 16, 16, causal=True),
    "several_chunks_window": attention(1, 600, 600, 2, 1, 10, 16, causal=True, window=70),
    "more_queries_than_keys": attention(1, 20, 12, 1, 1, 16, 16, causal=True),
    "fused_qkv": attention(1, 96, 96, 2, 2, 16, 16, q_view=View(96), k_view=View(96, 32), v_view=View(96, 64)),
    "prefill_at_offset": attention(1, 8, 64, 2, 2, 16, 16, causal=True, offset=True),
    "decode_grouped": attention(2, 1, 64, 4, 2, 16, 20, causal=True, offset=True),
    "decode_ragged": attention(1, 1, 37, 4, 1, 20, 20),
    "decode_window": attention(1, 1, 100, 4, 4, 24, 64, causal=True, offset=True, window=8, alibi_slopes=SLOPES),
    "rows_with_bias": attention(1, 2, 50, 2, 2, 16, 16, bias_shape=(1, 2, 2, 50)),
    "rows_without_keys": attention(1, 3, 2, 2, 2, 16, 16, causal=True),
    "known_bias": attention(2, 49, 49, 2, 2, 32, 32, bias_shape=(2, 2, 49, 49), bias_known=True),
    "known_bias_of_queries": attention(2, 37, 20, 2, 1, 8, 8, bias_shape=(1, 2, 37, 1), bias_known=True, causal=True),
    "known_bias_of_keys": attention(1, 20, 33, 2, 2, 8, 8, bias_shape=(1, 1, 1, 33), bias_known=True),
    "known_bias_of_rows": attention(1, 2, 33, 2, 2, 8, 8, bias_shape=(1, 2, 2, 33), bias_known=True),
    "bias_of_queries": attention(1, 50, 33, 2, 2, 8, 8, bias_shape=(1, 2, 50, 1), normaliser="sigmoid"),
    "bias_over_chunks": attention(1, 41, 601, 2, 2, 8, 8, bias_shape=(1, 1, 41, 601), causal=True, window=400),
    "last_queries_alone": attention(2, 67, 70, 4, 2, 24, 40, causal=True, alibi_slopes=SLOPES, window=50),
    "decode_split": attention(1, 1, 700, 3, 3, 20, 40),
    "decode_split_window": attention(1, 1, 700, 3, 1, 16, 16, causal=True, offset=True, window=20),
    "decode_split_sigmoid": attention(1, 2, 300, 3, 1, 64, 64, causal=True, normaliser="sigmoid", shift=-2.0),
    "sigmoid": attention(1, 37, 50, 2, 2, 16, 16, normaliser="sigmoid", shift=-3.9),
    "sigmoid_masked": attention(1, 60, 400, 2, 1, 16, 16, normaliser="sigmoid", causal=True, window=300),
    "sigmoid_biased": attention(1, 35, 35, 4, 4, 8, 8, normaliser="sigmoid", shift=1.0, bias_shape=(1, 4, 35, 35)),
    "clipped": attention(1, 37, 50, 2, 2, 16, 16, normaliser="clipped_softmax", stretch=(-0.03, 1.1)),
    "clipped_chunks": attention(1, 50, 600, 2, 1, 16, 16, normaliser="clipped_softmax", stretch=(-0.001, 1.0)),
    "clipped_masked": attention(
        1, 70, 64, 2, 1, 16, 16, normaliser="clipped_softmax", stretch=(-0.03, 1.03), causal=True, window=30
    ),
    "clipped_rows": attention(1, 1, 40, 3, 3, 16, 16, normaliser="clipped_softmax", stretch=(-0.02, 1.0)),
}


def inputs_of(kernel: AttentionKernel | RopeKernel, offset: int = 29) -> list[np.ndarray]:
    """Random operands and the given first position."""
    return [np.array(offset, a.dtype) if a.dtype == np.int32 else a for a in checking.random_inputs(kernel)]


@pytest.mark.parametrize("isa", checking.ISAS[:2])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_reference(case: str, isa: str) -> None:
    """Every mask, bias, grouping and length gives the float64 result."""
    checking.check(CASES[case], isa, inputs=inputs_of(CASES[case]))


@pytest.mark.parametrize("path", ["rows", "blocks"])
def test_attention_works_on_four_lanes(path: str) -> None:
    """Both forms hold for the narrowest vectors."""
    kernel = CASES["causal_alibi" if path == "blocks" else "decode_grouped"]
    assert kernel.knobs(checking.target_of("sse").isa)["path"] == path
    checking.check(kernel, "sse", inputs=inputs_of(kernel))


@pytest.mark.parametrize("case", ["causal_window", "causal_grouped"])
def test_every_knob_computes_the_same(case: str) -> None:
    """No candidate that tuning may choose changes the result."""
    kernel = replace(CASES[case], q_len=45, kv_len=83)
    space = kernel.knob_space(checking.target_of("avx2").isa)
    assert space[0] == kernel.knobs(checking.target_of("avx2").isa)
    tiles = {(int(knobs["vectors"]), int(knobs["keys"])) for knobs in space}
    assert len(tiles) == 3
    for vectors, keys in tiles:
        knobs = {"path": "blocks", "vectors": vectors, "keys": keys, "chunk": 2 * keys, "tail": 45 % 8}
        checking.check(kernel, "avx2", knobs=knobs)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 62, 63])
def test_decoding_sees_no_key_beyond_its_position(position: int) -> None:
    """Keys after the query's position may hold anything: the cache is not filled yet."""
    kernel = attention(1, 1, 64, 2, 2, 16, 16, causal=True, offset=True)
    q, k, v, offset = inputs_of(kernel, position)
    k[position + 1 :], v[position + 1 :] = 1e30, np.nan
    (out,) = checking.run(kernel, [q, k, v, offset], checking.target_of("avx2"))
    k[position + 1 :], v[position + 1 :] = 0.0, 0.0
    assert checking.relative_error(out, kernel.reference(q, k, v, offset)[0]) <= checking.TOLERANCE


def test_hidden_queries_give_zeros() -> None:
    """A query that sees no key gives exactly zeros, not an average of what it must not see."""
    for case in ("more_queries_than_keys", "rows_without_keys"):
        kernel = CASES[case]
        (out,) = checking.run(kernel, inputs_of(kernel), checking.target_of("avx2"))
        assert (out[: kernel.q_len - kernel.kv_len] == 0).all()


def test_large_scores_do_not_overflow() -> None:
    """The running maximum keeps weights finite when scores reach thousands."""
    kernel = attention(1, 40, 300, 1, 1, 16, 16, causal=True)
    inputs = [100 * array if index < 2 else array for index, array in enumerate(inputs_of(kernel))]
    (out,) = checking.run(kernel, inputs, checking.target_of("avx2"))
    # Scores near 1e5 carry float32 errors near 1e-2, so weights that nearly tie may differ by as much.
    assert checking.relative_error(out, kernel.reference(*inputs)[0]) <= 5e-2


@given(
    queries=st.integers(1, 80),
    keys=st.integers(1, 150),
    groups=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 10]),
    isa=st.sampled_from(checking.ISAS),
    normaliser=st.sampled_from(NORMALISERS),
)
@settings(max_examples=16)
def test_attention_holds_for_random_shapes(
    queries: int,
    keys: int,
    groups: tuple[int, int],
    sizes: tuple[int, int],
    causal: bool,
    window: int | None,
    isa: str,
    normaliser: Normaliser,
) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    options: dict[str, Any] = {"causal": causal, "window": window, "normaliser": normaliser}
    checking.check(attention(1, queries, keys, *groups, *sizes, **options), isa)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_keys_of_one_head_are_split_where_heads_do_not_fill_the_threads(heads: int) -> None:
    """Decoding shares heads out if that is even, else keys, and both give the same."""
    kernel = attention(1, 1, 512, heads, heads, 16, 16)
    knobs = kernel.knobs(replace(checking.target_of("avx2").isa, threads=2))
    assert (knobs["shares"], knobs["splits"]) == ((2, 1) if heads % 2 == 0 else (1, 2))
    for other in ({"shares": heads, "splits": 1}, {"shares": 1, "splits": 3}):
        checking.check(kernel, "avx2", knobs={**knobs, **other})


def test_queries_beyond_the_last_block_stand_alone() -> None:
    """A class token before 48 patches costs no block of its own; half a block does."""
    isa = checking.target_of("avx2").isa
    assert attention(1, 49, 49, 2, 2, 32, 32).knobs(isa)["tail"] == 1
    assert attention(1, 48, 48, 2, 2, 32, 32).knobs(isa)["tail"] == 0
    assert attention(1, 55, 55, 2, 2, 32, 32).knobs(isa)["tail"] == 0


@pytest.mark.parametrize(
    "case",
    [
        *("causal_alibi", "window", "bias_of_keys_alibi", "prefill_at_offset", "decode_window"),
        *("sigmoid", "sigmoid_masked", "clipped", "clipped_masked"),
    ],
)
def test_attention_means_what_the_graph_op_means(case: str) -> None:
    """The kernel's reference equals the semantics of the graph's attention."""
    kernel = CASES[case]
    inputs = [np.asarray(array, np.float64) if array.ndim else array for array in inputs_of(kernel)]
    shapes = ((kernel.q_len, kernel.heads), (kernel.kv_len, kernel.kv_heads), (kernel.kv_len, kernel.kv_heads))
    heads = [a.reshape(kernel.batch, *s, -1) for a, s in zip(inputs, shapes, strict=False)]
    op = Attention(
        scale=kernel.scale,
        causal=kernel.causal,
        window=kernel.window,
        alibi=kernel.alibi_slopes,
        has_offset=kernel.offset,
        has_bias=kernel.bias_shape is not None,
        normaliser=kernel.normaliser,
        shift=kernel.shift if kernel.normaliser == "sigmoid" else None,
        stretch=kernel.stretch,
    )
    expected = op.evaluate(*heads, *inputs[3:])
    np.testing.assert_allclose(kernel.reference(*inputs)[0], expected.reshape(kernel.outputs[0].shape), atol=1e-12)


ROPES = {
    "plain": RopeKernel(2, 5, 3, 8),
    "wide": RopeKernel(1, 9, 2, 40, base=500.0),
    "pair": RopeKernel(1, 1, 1, 2),
    "step": RopeKernel(2, 1, 2, 12, positions=50, offset=True),
    "window_of_a_wider_buffer": RopeKernel(1, 9, 2, 40, positions=64, offset=True, x_view=View(100, 10)),
}


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("case", ROPES)
def test_rope_equals_reference(case: str, isa: str) -> None:
    """Heads rotate by their position, also from an offset and out of a wider buffer."""
    kernel = ROPES[case]
    inputs = inputs_of(kernel)
    inputs[1] = kernel.table()
    checking.check(kernel, isa, inputs=inputs)


def test_rope_means_what_the_graph_op_means() -> None:
    """The kernel's reference equals the semantics of the graph's rotary position."""
    kernel = ROPES["step"]
    x, table, offset = inputs_of(kernel)
    x_BTHK = x.astype(np.float64).reshape(kernel.batch, kernel.t, kernel.heads, kernel.dim)
    expected = Rope(base=kernel.base, has_offset=True).evaluate(x_BTHK, offset)
    np.testing.assert_allclose(kernel.reference(x, table, offset)[0].reshape(expected.shape), expected, atol=1e-12)
