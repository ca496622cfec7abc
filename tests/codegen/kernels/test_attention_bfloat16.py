"""Attention whose operands are rounded to bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import View
from ir.ops.attention import Attention
from ir.rounding import round_to_bfloat16
from tests.codegen.kernels import checking

TOLERANCE = 2e-2  # of the output's scale: four roundings of 2^-9, of which those of scores are exponentiated


def kernel(**changes: object) -> AttentionKernel:
    base = AttentionKernel(2, 19, 19, 4, 2, 10, 7, scale=0.3, precision="bfloat16")
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


CASES = {
    "plain": kernel(),
    "causal": kernel(causal=True),
    "window": kernel(causal=True, window=5, q_len=33, kv_len=33),
    "two_way_window": kernel(window=4, q_len=40, kv_len=40),
    "odd_head": kernel(head_dim=13, value_dim=17),
    "alibi": kernel(alibi_slopes=(0.5, 0.25, 0.125, 0.0625), causal=True),
    "bias": kernel(bias_shape=(1, 4, 19, 19)),
    "more_keys": kernel(kv_len=71, causal=True),
    "offset": kernel(kv_len=71, causal=True, offset=True),
    "windows_of_a_wider_buffer": kernel(q_view=View(80, 0), k_view=View(80, 40), v_view=View(80, 61)),
    "many_chunks": kernel(batch=1, q_len=9, kv_len=1301, heads=2, head_dim=16, value_dim=16),
    "last_queries_alone": kernel(q_len=35, kv_len=37, batch=1, heads=3, kv_heads=1),
    "last_queries_alone_causal": kernel(q_len=65, kv_len=65, causal=True),
    "known_bias": kernel(q_len=17, bias_shape=(2, 4, 17, 19), bias_known=True),
    "sigmoid": kernel(q_len=37, kv_len=37, normaliser="sigmoid", shift=-2.0, causal=True),
    "clipped": kernel(q_len=37, kv_len=37, normaliser="clipped_softmax", stretch=(-0.02, 1.1)),
    "few_queries": kernel(q_len=1, kv_len=30),
}


@pytest.mark.parametrize("isa", [checking.NATIVE, "avx2"])
@pytest.mark.parametrize("case", CASES)
def test_rounded_attention_is_near_the_exact_one(case: str, isa: str) -> None:
    """Masks, biases, odd sizes and windows, against float64 of operands that nobody rounded."""
    exact = replace(CASES[case], precision="float32")
    inputs = checking.random_inputs(exact)
    (expected,) = exact.reference(*inputs)
    (found,) = checking.run(CASES[case], inputs, checking.target_of(isa))
    assert checking.relative_error(found, expected) < TOLERANCE


@given(
    q_len=st.integers(4, 70),
    extra=st.integers(0, 30),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    causal=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_rounded_attention_of_any_size(q_len: int, extra: int, heads: int, head_dim: int, causal: bool) -> None:
    """Whatever is odd or smaller than a tile is padded."""
    made = AttentionKernel(1, q_len, q_len + extra, heads, heads, head_dim, head_dim + 3, head_dim**-0.5, causal)
    inputs = checking.random_inputs(made)
    (expected,) = made.reference(*inputs)
    (found,) = checking.run(replace(made, precision="bfloat16"), inputs, checking.target_of(checking.NATIVE))
    assert checking.relative_error(found, expected) < TOLERANCE


def test_every_knob_rounds_alike() -> None:
    """Blocks of any width give the same numbers but for the order of float32 sums."""
    made = CASES["causal"]
    inputs = checking.random_inputs(made)
    target = checking.target_of(checking.NATIVE, threads=1)
    results = [checking.run(made, inputs, target, knobs)[0] for knobs in made.knob_space(target.isa)[:5]]
    for other in results[1:]:
        assert checking.relative_error(other, results[0]) < TOLERANCE


def test_output_is_stored_as_bits_of_the_same_numbers() -> None:
    """Storage rounds what would have been written, once."""
    made = CASES["causal"]
    inputs = checking.random_inputs(made)
    target = checking.target_of(checking.NATIVE)
    (numbers,) = checking.run(made, inputs, target)
    (stored,) = checking.run(made.in_bfloat16(frozenset(), frozenset({0})), inputs, target)
    assert np.array_equal(stored, round_to_bfloat16(numbers))


def test_single_rows_keep_their_output_and_products_in_float32() -> None:
    """A decode step waits for memory; its attention is the exact one."""
    assert CASES["plain"].can_round(0)
    assert not CASES["few_queries"].can_round(0)
    inputs = checking.random_inputs(CASES["few_queries"])
    (expected,) = CASES["few_queries"].reference(*inputs)
    (found,) = checking.run(CASES["few_queries"], inputs, checking.target_of("avx2"))
    assert checking.relative_error(found, expected) < checking.TOLERANCE


def test_operation_rounds_all_four_operands() -> None:
    """With one key the weight is 1 and the output is the rounded value; the default rounds nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 1, 4)) for _ in range(3))
    assert np.array_equal(Attention(0.5, precision="bfloat16").evaluate(q, k, v), round_to_bfloat16(v))
    assert np.array_equal(Attention(0.5).evaluate(q, k, v), v)
