"""The delta rule of the outer scan against its equation in matrices, and in limiting cases."""

from __future__ import annotations

import numpy as np
import pytest

from ir.builder import Builder
from ir.errors import GraphError
from ir.ops.recurrence import Decay, OuterScan
from ir.text import parse_graph, print_graph
from ir.types import TensorType

ATOL = 1e-12
"""A few units in the last place of float64 after some dozens of products near one."""
STEPS, HEADS, KEYS, VALUES = 6, 2, 4, 3


def operands(decay: Decay, seed: int = 0) -> list[np.ndarray]:
    """Random q, k, v, log decays if any, and beta in (0, 1)."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, STEPS, HEADS, size)) for size in (KEYS, KEYS, VALUES))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = {"head": [-rng.random((2, STEPS, HEADS))], "key": [-rng.random((2, STEPS, HEADS, KEYS))]}.get(decay, [])
    return [q, k, v, *gates, rng.random((2, STEPS, HEADS))]


@pytest.mark.parametrize("decay", ["none", "head", "key"])
def test_delta_rule_equals_its_matrix_equation(decay: Decay):
    """S_t = (I - beta k k^T) diag(a) S_{t-1} + beta k v^T, one head and sequence at a time."""
    q, k, v, *gates, beta = operands(decay)
    found, last = OuterScan(decay, 0.5, delta=True).evaluate(q, k, v, *gates, beta)
    for n, h in np.ndindex(2, HEADS):
        state = np.zeros((KEYS, VALUES))
        for t in range(STEPS):
            kept = np.exp(gates[0][n, t, h]) * np.ones(KEYS) if gates else np.ones(KEYS)
            erase = np.eye(KEYS) - beta[n, t, h] * np.outer(k[n, t, h], k[n, t, h])
            state = erase @ np.diag(kept) @ state + beta[n, t, h] * np.outer(k[n, t, h], v[n, t, h])
            np.testing.assert_allclose(found[n, t, h], 0.5 * state.T @ q[n, t, h], atol=ATOL)
        np.testing.assert_allclose(last[n, h], state, atol=ATOL)


def test_delta_rule_with_orthogonal_keys_is_linear_attention():
    """Nothing is found under a key that is orthogonal to all before, so all of beta v is written."""
    q, _, v, beta = operands("none")
    q, v, beta = q[:, :KEYS], v[:, :KEYS], beta[:, :KEYS]
    k = np.broadcast_to(np.eye(KEYS)[None, :, None], q.shape)
    found, _ = OuterScan(delta=True).evaluate(q, k, v, beta)
    expected, _ = OuterScan().evaluate(q, k, beta[..., None] * v)
    np.testing.assert_allclose(found, expected, atol=ATOL)


def test_delta_rule_resumes_from_its_state():
    """Some tokens, then the rest from the state they left, give the whole."""
    op, resumed = OuterScan("head", delta=True), OuterScan("head", delta=True, has_state=True)
    steps = operands("head")
    whole, last = op.evaluate(*steps)
    first, state = op.evaluate(*(x[:, :2] for x in steps))
    second, end = resumed.evaluate(*(x[:, 2:] for x in steps), state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=ATOL)
    np.testing.assert_allclose(end, last, atol=ATOL)


def test_delta_rule_refuses_what_does_not_fit():
    """It needs beta, one number a head and step, and has no decay of single cells."""
    heads, beta = TensorType((2, STEPS, HEADS, KEYS)), TensorType((2, STEPS, HEADS))
    rate = TensorType((HEADS, KEYS, KEYS))
    OuterScan(delta=True).infer_types((heads, heads, heads, beta))
    for op, rest in [
        (OuterScan(delta=True), ()),
        (OuterScan(delta=True), (heads,)),
        (OuterScan("state", delta=True), (heads, rate, beta)),
        (OuterScan(), (beta,)),
    ]:
        with pytest.raises(GraphError):
            op.infer_types((heads, heads, heads, *rest))


def test_delta_rule_costs_one_more_read_of_the_state():
    """Two operations a cell of the state and step, and the text form says `delta`."""
    b = Builder()
    q = b.input("q", (2, STEPS, HEADS, KEYS))
    beta = b.sigmoid(b.input("beta", (2, STEPS, HEADS)))
    state = b.input("state", (2, HEADS, KEYS, KEYS))
    y, last = b.outer_scan(q, q, q, beta=beta, state=state)
    graph = b.build(y=y, last=last)
    node = graph.node(y.value.node)
    cells = 2 * STEPS * HEADS * KEYS * KEYS
    assert node.op.flops(graph.operand_types(node), node.types) == 6 * cells
    text = print_graph(graph)
    assert "delta=" in text
    assert print_graph(parse_graph(text)) == text
