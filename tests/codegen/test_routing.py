"""Order, gather and scatter inside whole graphs: fused with their neighbours, compiled and run."""

from __future__ import annotations

import numpy as np

from ir.builder import Builder, Tensor
from tests.codegen.test_lower import run, weight
from tests.codegen.test_select import selected


def mixture(b: Builder, x: Tensor) -> Tensor:
    """Two of five experts for each token, each a scale; their outputs weighted and added up, token by token."""
    tokens, width = x.shape
    scores, experts = b.top_k(b.matmul(x, weight(b, "router", width, 5)), 2)
    shares = b.reshape(b.softmax(scores), tokens * 2, 1)
    scales = b.take(weight(b, "scales", 5, width), b.reshape(experts, tokens * 2))
    token = b.constant(np.repeat(np.arange(tokens), 2)[:, None])
    routed = b.gather(x, token, 0) * scales * shares
    return b.scatter_add(x, token, routed, 0)


def test_mixture_of_experts_runs_as_defined(tmp_path) -> None:
    """Selection, lookup, gather and scatter give what the interpreter gives."""
    b = Builder()
    run(b.build(y=mixture(b, b.input("x", (7, 12)))), tmp_path)


def test_gather_is_fused_with_what_surrounds_it() -> None:
    """A gather between elementwise steps is part of their chain; its operand's steps are computed where it reads."""

    def chain(b: Builder, x: Tensor) -> Tensor:
        return b.gather(x * 2.0, b.input("i", (2, 5, 1), "int32"), 1) + 1.0

    assert selected(chain) == ["fused(mul-gather-add)"]


def test_gather_along_every_axis_runs_as_defined(tmp_path) -> None:
    """Indices of single elements and of whole rows, along the last axis, between, and the first."""
    b = Builder()
    x = b.input("x", (3, 4, 21))
    outputs: dict[str, Tensor] = {}
    for axis, shape in enumerate([(5, 4, 21), (3, 5, 21), (3, 4, 33)]):
        shared = tuple(size if other == axis else 1 for other, size in enumerate(shape))
        outputs[f"each{axis}"] = b.gather(x, b.input(f"i{axis}", shape, "int32"), axis)
        outputs[f"row{axis}"] = b.exp(b.gather(x, b.input(f"j{axis}", shared, "int32"), axis))
    run(b.build(**outputs), tmp_path)


def test_sort_runs_as_defined(tmp_path) -> None:
    """Values, positions, and what is gathered by them from another tensor."""
    b = Builder()
    x, other = b.input("x", (3, 19)), b.input("other", (3, 19))
    values, order = b.sort(x)
    run(b.build(values=values, order=order, other=b.gather(other, order, -1)), tmp_path)
