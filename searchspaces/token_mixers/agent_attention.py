"""Attention through few agents."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference

_BIASES = {f"{group}_{part}": 0.0 for group in ("gather", "spread") for part in ("block", "rows", "columns")}


class AgentAttention(TokenMixer):
    """Agents attend all tokens, and tokens attend the agents (Han et al. 2024).

    Agents a are the means of q over A x A parts of the image, n = A^2 of them. u_a = sum_s softmax_s(a . k_s / sqrt(K)
    + B1) v_s, o_t = sum_a softmax_a(q_t . a / sqrt(K) + B2) u_a in each of H heads; y = (concat_h(o) + conv(v)) W_out,
    conv a depthwise 3 x 3 window. Each bias, `[H, n, T]`, is a block of P x P learned numbers stretched over the image
    plus one number a row and one a column. 4 D^2 + 2 H n (P^2 + rows + columns) parameters and the convolution's.
    Linear in the number of tokens.
    """

    paper = "Han et al. 2024, Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874"
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3, "agents": 2, "block": 3}, grid=(4, 6)),
        Case({"num_heads": 2, "agents": 3, "block": 2}, grid=(5, 4), d_model=6, batch=1),
        Case({"num_heads": 1, "agents": 1, "block": 7}, grid=(3, 5), d_model=5),
    )
    limits = (
        Limit(
            "where queries are zero it averages all values, as attention does",
            Case({"num_heads": 3, "agents": 2, "block": 3}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            values={"q": 0.0, "q_bias": 0.0, "kernel": 0.0, "kernel_bias": 0.0, **_BIASES},
        ),
    )

    num_heads: int = option(3, minimum=1, maximum=1024, doc="Heads.")
    agents: int = option(7, minimum=1, maximum=64, doc="Agents along each side of the image.")
    block: int = option(7, minimum=1, maximum=64, doc="Side of the block of numbers that biases stretch.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        tokens = b.reshape(x, batch, height * width, d_model)
        q, k, v = (b.linear(tokens, name, heads, bias=True) for name in "qkv")
        members = np.kron(_members(height, self.agents), _members(width, self.agents))
        sums = b.matmul(b.constant(members), q)
        agents = b.split_heads(sums / b.constant(members.sum(axis=1, keepdims=True)), self.num_heads)
        near = convolutions.depthwise(b, b.reshape(v, *x.shape), "kernel", 3)
        q, k, v = (b.split_heads(z, self.num_heads) for z in (q, k, v))
        told = b.attention(agents, k, v, bias=self._bias(b, "gather", height, width))
        heard = b.attention(q, agents, told, bias=b.transpose(self._bias(b, "spread", height, width), 0, 1, 3, 2))
        y = b.matmul(b.reshape(heard, *x.shape) + near, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def _bias(self, b: Builder, name: str, height: int, width: int) -> Tensor:
        """Scores of agents and places, `[1, H, n, T]`."""
        count = self.agents**2
        pairs = (Axis("heads", self.num_heads), Axis("agents", count))

        def learned(part: str, size: int) -> Tensor:
            return b.parameter(f"{name}_{part}", (pairs, (Axis(part, size),)), "normal(0.02)")

        stretch = np.kron(_stretch(height, self.block), _stretch(width, self.block))
        block = b.matmul(learned("block", self.block**2), b.constant(stretch), transpose_b=True)
        block = b.reshape(block / float(4 * height * width), -1, count, height, width)
        rows = b.reshape(learned("rows", height), -1, count, height, 1)
        columns = b.reshape(learned("columns", width), -1, count, 1, width)
        return b.reshape(block + rows + columns, 1, self.num_heads, count, height * width)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        q, k, v = (x @ params[name] + params[f"{name}_bias"] for name in "qkv")
        near = reference.convolve(v, params["kernel"], groups=d_model) + params["kernel_bias"]
        side = self.agents
        parts = [[(i * size // side, -(-(i + 1) * size // side)) for i in range(side)] for size in (height, width)]
        agents = np.stack([q[:, i:u, j:w].mean(axis=(1, 2)) for i, u in parts[0] for j, w in parts[1]], axis=1)
        q, k, v = (np.reshape(z, (batch, height * width, d_model)) for z in (q, k, v))
        q, k, v, agents = (reference.split_heads(z, self.num_heads) for z in (q, k, v, agents))
        scores = np.einsum("bahk,bshk->bhas", agents, k) / q.shape[-1] ** 0.5
        told = np.einsum("bhas,bshk->bahk", reference.softmax(scores + self._learned(params, "gather", x)), v)
        scores = np.einsum("bthk,bahk->bhta", q, agents) / q.shape[-1] ** 0.5
        bias = np.swapaxes(self._learned(params, "spread", x), 1, 2)
        heard = np.einsum("bhta,bahk->bthk", reference.softmax(scores + bias), told)
        return (np.reshape(heard, x.shape) + near) @ params["out"] + params["out_bias"]

    def _learned(self, params: Mapping[str, Array], name: str, x: Array) -> Array:
        """The bias `[H, n, T]`, place by place."""
        (_, height, width, _), side, count = x.shape, self.block, self.agents**2
        block = np.reshape(params[f"{name}_block"], (self.num_heads, count, side, side))
        rows = np.reshape(params[f"{name}_rows"], (self.num_heads, count, height))
        columns = np.reshape(params[f"{name}_columns"], (self.num_heads, count, width))
        places: list[Array] = []
        for i in range(height):
            for j in range(width):
                (up, down, low), (left, right, far) = _between(i, height, side), _between(j, width, side)
                upper = (1 - far) * block[:, :, up, left] + far * block[:, :, up, right]
                lower = (1 - far) * block[:, :, down, left] + far * block[:, :, down, right]
                places.append((1 - low) * upper + low * lower + rows[:, :, i] + columns[:, :, j])
        return np.stack(places, axis=-1)


def _members(count: int, parts: int) -> Array:
    """Which elements of an axis are in which of equal parts, `[parts, count]`; parts that do not divide it overlap."""
    result = np.zeros((parts, count))
    for part in range(parts):
        result[part, part * count // parts : -(-(part + 1) * count // parts)] = 1.0
    return result


def _between(place: int, count: int, known: int) -> tuple[int, int, float]:
    """Which of some known points along an axis a place lies between, and how far from the first to the second."""
    exact = min(max((place + 0.5) * known / count - 0.5, 0.0), known - 1.0)
    first = math.floor(exact)
    return first, min(first + 1, known - 1), exact - first


def _stretch(count: int, known: int) -> Array:
    """Linear interpolation of known points along an axis, times 2 count: whole numbers `[count, known]`."""
    result = np.zeros((count, known))
    for place in range(count):
        first, second, share = _between(place, count, known)
        result[place, first] += round(2 * count * (1.0 - share))
        result[place, second] += round(2 * count * share)
    return result
