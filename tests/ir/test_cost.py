"""Costs against figures worked out by hand."""

from __future__ import annotations

import pytest

from ir.builder import Builder
from ir.cost import node_costs, profile, state_bytes
from ir.errors import GraphError
from ir.ops.convolution import Pool
from ir.types import Axis
from tests.ir.models import decoder, recurrence


def test_matmul_costs_two_flops_a_multiply_add():
    """[2, 5, 8] x [8, 3]: 2 * 2 * 5 * 3 * 8 FLOPs; operands and result are moved once."""
    b = Builder()
    graph = b.build(y=b.matmul(b.input("x", (2, 5, 8)), b.parameter("w", ((Axis("d", 8),), (Axis("e", 3),)))))
    cost = profile(graph)
    assert cost.flops == 2 * 2 * 5 * 3 * 8
    assert cost.bytes_moved == 4 * (80 + 24 + 30)
    assert (cost.params, cost.param_bytes) == (24, 96)
    assert cost.peak_activation_bytes == 4 * (80 + 30)
    assert [entry.flops for entry in node_costs(graph)] == [0, 0, cost.flops]


def test_conv_attention_and_pool_cost_by_hand():
    """Grouped convolution, causal grouped attention and pooling, each counted on paper."""
    b = Builder()
    x = b.input("x", (2, 6, 4))
    weight = b.parameter("w", ((Axis("k", 3),), (Axis("c", 2),), (Axis("o", 8),)))
    graph = b.build(y=b.conv(x, weight, groups=2))
    assert profile(graph).flops == 2 * (2 * 4 * 8) * (3 * 2)
    b = Builder()
    q, k, v = b.input("q", (1, 4, 2, 3)), b.input("k", (1, 4, 1, 3)), b.input("v", (1, 4, 1, 5))
    assert profile(b.build(y=b.attention(q, k, v, causal=True))).flops == 2 * 10 * (2 * 3 + 2 * 5 + 5)
    b = Builder()
    pooled = b.pool(b.input("x", (1, 6, 4)), Pool("max", (2,), (2,), ((0, 0),)))
    assert profile(b.build(y=pooled)).flops == 3 * 4 * 2


def test_cost_of_depth_is_linear():
    """Every layer adds the same parameters, FLOPs and bytes moved, and depth does not raise the memory peak."""
    costs = [profile(decoder(layers)) for layers in (1, 2, 3)]
    for name in ("params", "flops", "bytes_moved"):
        first, second, third = (getattr(cost, name) for cost in costs)
        assert third - second == second - first > 0
    assert costs[0].peak_activation_bytes == costs[2].peak_activation_bytes


def test_attention_grows_as_the_square_and_a_window_linearly():
    """The FLOPs of full attention quadruple with the length; those of a window double, its edge aside."""

    def flops(time: int, window: int | None) -> int:
        b = Builder()
        q = b.input("q", (1, time, 1, 4))
        return profile(b.build(y=b.attention(q, q, q, window=window, causal=window is not None))).flops

    assert flops(64, None) == 4 * flops(32, None)
    assert flops(64, 8) - flops(32, 8) == flops(96, 8) - flops(64, 8)


def test_cost_of_a_long_sequence_takes_no_memory():
    """Counting the visible pairs of a million tokens builds no mask."""
    b = Builder()
    q = b.input("q", (1, 2**20, 1, 2))
    cost = profile(b.build(y=b.attention(q, q, q, causal=True)))
    assert cost.flops == 2**20 * (2**20 + 1) // 2 * 13


def test_tied_parameters_count_once():
    """Untying the head adds exactly one table of 11 x 8."""
    assert profile(decoder(tied=False)).params - profile(decoder(tied=True)).params == 88


def test_dead_nodes_cost_nothing():
    """What no output depends on is not counted."""
    b = Builder()
    x = b.input("x", (4,))
    b.exp(x + b.parameter("w", ((Axis("d", 4),),)))
    cost = profile(b.build(y=-x))
    assert (cost.params, cost.flops, cost.peak_activation_bytes) == (0, 4, 32)


def test_reshape_shares_memory():
    """A chain through views holds the input and one result at a time."""
    b = Builder()
    x = b.input("x", (4, 6))
    y = b.reshape(b.exp(b.reshape(x, 24)), 2, 12)
    cost = profile(b.build(y=y))
    assert cost.peak_activation_bytes == 2 * 96
    assert cost.bytes_moved == 2 * 96


def test_peak_follows_lifetimes():
    """A residual keeps its operand alive; a plain chain needs two values at a time; outputs stay to the end."""
    b = Builder()
    x = b.input("x", (10,))
    graph = b.build(y=b.exp(b.exp(b.exp(x))))
    assert profile(graph).peak_activation_bytes == 80
    b = Builder()
    x = b.input("x", (10,))
    assert profile(b.build(y=b.exp(b.exp(x)) + x)).peak_activation_bytes == 120
    b = Builder()
    x = b.input("x", (10,))
    first = b.exp(x)
    assert profile(b.build(first=first, y=b.exp(b.exp(b.exp(first))))).peak_activation_bytes == 120


def test_parameters_and_views_of_them_are_no_activations():
    """Only the result counts where everything else is stored weights."""
    b = Builder()
    weight = b.reshape(b.parameter("w", ((Axis("d", 6),),)), 2, 3)
    assert profile(b.build(y=b.exp(weight) + 1.0)).peak_activation_bytes == 48


def test_state_bytes_counts_state_inputs():
    """The step graph carries one [1, 2, 4, 4] state; other inputs are not state."""
    assert state_bytes(recurrence()) == 4 * 32
    assert state_bytes(decoder()) == 0


def test_cost_refuses_components():
    """A component node has no cost by itself; the error says what to run."""
    b = Builder()
    graph = b.build(y=b.component("norm", "rms_norm", (), b.input("x", (2, 3))))
    with pytest.raises(GraphError, match="expand_components"):
        profile(graph)
