"""Small graphs that several tests share."""

from __future__ import annotations

import numpy as np

from ir.builder import Builder
from ir.graph import Graph
from ir.types import Axis


def decoder(layers: int = 2, time: int = 5, *, tied: bool = True, d_model: int = 8, causal: bool = True) -> Graph:
    """A causal language model: embedding, attention and gated-linear layers, a tied or untied head."""
    b = Builder()
    tokens = b.input("tokens", (2, time), "int32")
    model, heads, size = Axis("d_model", d_model), Axis("heads", 2), Axis("head_dim", d_model // 2)
    with b.scope("embed"):
        table = b.parameter("table", ((Axis("vocab", 11),), (model,)), "normal(0.02)")
        x = b.take(table, tokens)
    for layer in range(layers):
        with b.scope(f"layers.{layer}"):
            with b.scope("norm"):
                y = b.rms_norm(x, b.parameter("scale", ((model,),), "constant(1)"))
            with b.scope("mixer"):
                q, k, v = (b.split_heads(b.linear(y, name, (heads, size)), 2) for name in "qkv")
                mixed = b.merge_heads(b.attention(b.rope(q), b.rope(k), v, causal=causal))
                x = x + b.matmul(mixed, b.parameter("out", ((heads, size), (model,))))
            with b.scope("mlp"):
                gate, up = (b.linear(x, name, (Axis("hidden", 2 * d_model),)) for name in ("gate", "up"))
                x = x + b.linear(b.silu(gate) * up, "down", (model,))
    with b.scope("head"):
        weight = table if tied else b.parameter("table", ((Axis("vocab", 11),), (model,)))
        logits = b.matmul(x, weight, transpose_b=True)
    return b.build(logits=logits)


def recurrence() -> Graph:
    """One step of a gated recurrence: several results, state in and out, attributes of every kind."""
    b = Builder()
    x = b.input("x", (1, 1, 2, 4))
    state = b.input("state.s", (1, 2, 4, 4))
    position = b.input("position", (), "int32")
    with b.scope("mixer"):
        gate = b.parameter("gate", ((Axis("heads", 2),),), "uniform(-1, 0)")
        decay = b.broadcast(gate, 1, 1, 2)
        y, last = b.outer_scan(x, x, x, decay, decay="head", scale=0.5, state=state)
    with b.scope("cache"):
        base = b.constant(np.array([[1.0, -0.0], [np.inf, 0.1]]))
        cache = b.dynamic_update(base, b.slice(base, 0, 0, 1), position, 0)
        big = b.constant(np.arange(17.0))
    return b.build(**{"y": y, "state.s": last, "cache": cache, "big": big})
