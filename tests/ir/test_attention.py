"""Attention whose weights are no softmax, against their equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ir.builder import Builder
from ir.errors import GraphError
from ir.ops.attention import Attention
from ir.types import TensorType

HEADS = TensorType((2, 5, 4, 6))


def attend(weigh: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one head, query by query: `weigh(scores)` of the keys that a query sees."""
    out = np.zeros((q.shape[0], v.shape[1]))
    for t in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + t + 1
        scores = [float(q[t] @ k[s]) for s in range(seen)]
        for s, weight in enumerate(weigh(scores)):
            out[t] += weight * v[s]
    return out


def clipped(scores: list[float], low: float, high: float) -> list[float]:
    """The clipped softmax, literally."""
    total = sum(math.exp(score) for score in scores)
    return [min(1.0, max(0.0, (high - low) * math.exp(score) / total + low)) for score in scores]


@pytest.mark.parametrize(
    ("options", "weigh"),
    [
        ({"normaliser": "sigmoid"}, lambda scores: [1 / (1 + math.exp(math.log(6) - score)) for score in scores]),
        ({"normaliser": "sigmoid", "shift": 0.5}, lambda scores: [1 / (1 + math.exp(-0.5 - x)) for x in scores]),
        ({"normaliser": "clipped_softmax", "stretch": (-0.2, 1.1)}, lambda scores: clipped(scores, -0.2, 1.1)),
        ({"normaliser": "clipped_softmax"}, lambda scores: clipped(scores, 0.0, 1.0)),
    ],
)
def test_weights_follow_their_equation(options: dict[str, Any], weigh: Any) -> None:
    """Each key that a query sees is weighed by the equation of the normaliser."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 3)), rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    found = Attention(1.0, causal=True, **options).evaluate(*(x[None, :, None, :] for x in (q, k, v)))
    np.testing.assert_allclose(found[0, :, 0], attend(weigh, q, k, v), atol=1e-12)


@pytest.mark.parametrize("normaliser", ["softmax", "sigmoid", "clipped_softmax"])
def test_queries_without_keys_give_zeros(normaliser: Any) -> None:
    """Whatever the normaliser, what sees nothing is zero."""
    q, kv = np.ones((1, 4, 1, 2)), np.ones((1, 2, 1, 2))
    found = Attention(1.0, causal=True, normaliser=normaliser).evaluate(q, kv, kv)
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:] != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normaliser": "hardmax"}, "unknown normaliser"),
        ({"shift": 1.0}, "only sigmoid"),
        ({"stretch": (-0.1, 1.0)}, "only the clipped softmax"),
        ({"normaliser": "clipped_softmax", "stretch": (0.1, 1.0)}, "stretch must reach"),
        ({"precision": "float8"}, "unknown precision"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    """An option of another normaliser, or a range that hidden keys would leave, is an error."""
    with pytest.raises(GraphError, match=message):
        Attention(1.0, **options).infer(HEADS, HEADS, HEADS)


def test_builder_passes_options_on() -> None:
    """The builder's method sets the attributes of the operation."""
    b = Builder()
    q = b.input("q", (1, 4, 2, 8))
    graph = b.build(y=b.attention(q, q, q, normaliser="clipped_softmax", stretch=(-0.03, 1.0)))
    (op,) = (node.op for node in graph.nodes if isinstance(node.op, Attention))
    assert (op.normaliser, op.stretch, op.shift) == ("clipped_softmax", (-0.03, 1.0), None)
