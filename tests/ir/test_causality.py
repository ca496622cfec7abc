"""The causality check finds what looks ahead, and only that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ir.builder import Builder, Tensor
from ir.causality import check_causal
from ir.errors import GraphError
from ir.graph import Graph
from ir.ops.convolution import Pool
from ir.types import Axis
from tests.ir.models import decoder
from tests.ir.random_graphs import draw_values

Mixer = Callable[[Builder, Tensor], Tensor]


def graph_of(mixer: Mixer) -> Graph:
    b = Builder()
    return b.build(y=mixer(b, b.input("x", (2, 6, 4))))


def check(graph: Graph, source: str = "x", output: str = "y") -> int | None:
    return check_causal(graph, source, output, draw_values(graph)[1], rng=np.random.default_rng(0))


def attention(**options: object) -> Mixer:
    def mix(b: Builder, x: Tensor) -> Tensor:
        q = b.split_heads(x, 2)
        return b.merge_heads(b.attention(q, q, q, **options))  # type: ignore[arg-type]

    return mix


def conv(before: int, after: int) -> Mixer:
    def mix(b: Builder, x: Tensor) -> Tensor:
        weight = b.parameter("w", ((Axis("k", 3),), (), (Axis("d_model", 4),)))
        return b.conv(x, weight, padding=((before, after),), groups=4)

    return mix


CAUSAL: dict[str, Mixer] = {
    "attention": attention(causal=True),
    "window": attention(causal=True, window=2),
    "conv": conv(2, 0),
    "cumsum": lambda b, x: b.cumsum(x, 1),
    "scan": lambda b, x: b.merge_heads(b.outer_scan(*[b.split_heads(x, 2)] * 3)[0]),
    "softmax_of_channels": lambda b, x: b.softmax(x),
    "constant": lambda b, x: x * 0.0,
}

LOOKING_AHEAD: dict[str, tuple[Mixer, int]] = {
    "attention": (attention(), 1),
    "window": (attention(window=2), 1),
    "conv": (conv(1, 1), 1),
    "mean": (lambda b, x: x - b.mean(x, 1, keepdims=True), 1),
    "softmax_of_tokens": (lambda b, x: b.softmax(x, 1), 1),
    "last_token": (lambda b, x: x + b.slice(x, 1, 5, 6), 5),
    "pool": (lambda b, x: b.pool(x, Pool("average", (2,), (1,), ((0, 1),))), 1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mixers_pass(name: str):
    """What reads the past only is found causal."""
    assert check(graph_of(CAUSAL[name])) is None


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_looking_ahead_is_found(name: str):
    """What reads ahead is found, with the first position that leaks."""
    mixer, position = LOOKING_AHEAD[name]
    assert check(graph_of(mixer)) == position


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_are_exchanged_within_the_vocabulary(causal: bool):
    """Token inputs are changed to other valid tokens, through the embedding."""
    found = check(decoder(causal=causal), "tokens", "logits")
    assert found == (None if causal else 1)


def test_causality_needs_an_axis_in_common():
    """An output without the token axis cannot be checked, nor can an unknown one."""
    b = Builder()
    graph = b.build(y=b.mean(b.input("x", (2, 6, 4)), 1))
    with pytest.raises(GraphError, match="differ in length"):
        check(graph)
    with pytest.raises(GraphError, match="no such input or output"):
        check(graph, "z")
