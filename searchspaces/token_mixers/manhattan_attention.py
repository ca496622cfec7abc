"""Attention that decays with the way between two pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference

_TURNS = 10000.0  # the slowest pair of channels turns so many times slower than the fastest


class ManhattanAttention(TokenMixer):
    """Attention whose scores fall with the Manhattan distance of pixels (Fan et al. 2023, RMT).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K) + log(gamma_h) (|row_t - row_s| + |column_t - column_s|)) v_s with
    gamma_h = 1 - 2^(-a - b h / H) in head h of H; y = (concat_h(o) + conv(v)) W_out, conv a depthwise window on the
    values. Queries and keys are turned by their number in row order, pair i of K / 2 at 10000^(-i / (K / 2 - 1)).
    `decomposed` attends along rows first, then along columns to what came out, each with its own softmax: T^1.5 in
    tokens instead of T^2. The paper multiplies weights by the decay; the published code, as here, adds its logarithm.
    """

    paper = "Fan et al. 2023, RMT: Retentive Networks Meet Vision Transformers, arXiv 2309.11523"
    spatial = True
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"num_heads": 3}, grid=(5, 4)),
        Case({"num_heads": 3, "decomposed": True}, grid=(4, 5)),
        Case({"num_heads": 1, "decomposed": True, "rotary": False, "kernel_size": 3}, grid=(3, 5), d_model=5, batch=1),
        Case({"num_heads": 3, "decay_start": 1.0, "decay_range": 2.0}, grid=(3, 3), d_model=6, batch=1),
    )
    limits = (
        Limit(
            "without decay, turns and convolution it is multi-head attention",
            Case({"num_heads": 3, "decay_start": 60.0, "rotary": False}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            values={"kernel": 0.0, "kernel_bias": 0.0},
        ),
        Limit(
            "decomposed over a single row, without decay, it is multi-head attention",
            Case({"num_heads": 2, "decomposed": True, "rotary": False, "decay_start": 60.0}, grid=(1, 7), d_model=6),
            "softmax_attention",
            {"num_heads": 2, "bias": True, "causal": False},
            values={"kernel": 0.0, "kernel_bias": 0.0},
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    decomposed: bool = option(False, doc="Attend along rows, then along columns.")
    decay_start: float = option(2.0, minimum=0.1, maximum=60.0, doc="a in the first head's decay 1 - 2^-a.")
    decay_range: float = option(4.0, minimum=0.0, maximum=60.0, doc="b, by which the exponent grows over the heads.")
    kernel_size: int = option(5, minimum=1, maximum=31, doc="Height and width of the window on the values, pixels.")
    rotary: bool = option(True, doc="Turn queries and keys by their position.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.rotary and d_model // self.num_heads % 2:
            return f"heads of {d_model // self.num_heads} channels have no pairs to turn"
        return None

    def growth_exponent(self) -> float:
        return 1.5 if self.decomposed else 2.0

    def _slopes(self) -> tuple[float, ...]:
        exponents = [self.decay_start + self.decay_range * head / self.num_heads for head in range(self.num_heads)]
        return tuple(float(np.float32(-np.log1p(-(2.0**-exponent)))) for exponent in exponents)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        tokens = b.reshape(x, batch, height * width, d_model)
        q, k, v = (b.split_heads(b.linear(tokens, name, heads, bias=True), self.num_heads) for name in "qkv")
        if self.rotary:
            base = _TURNS ** (heads[1].size / max(heads[1].size - 2, 1))  # so that the last pair has that speed
            q, k = b.rope(q, base=base), b.rope(k, base=base)
        o = self._decomposed(b, q, k, v, (height, width)) if self.decomposed else self._whole(b, q, k, v, width)
        near = convolutions.depthwise(b, b.reshape(v, *x.shape), "kernel", self.kernel_size)
        out = b.parameter("out", (heads, (Axis("d_model", d_model),)))
        y = b.matmul(b.reshape(o, *x.shape) + near, out)
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def _whole(self, b: Builder, q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        rows, columns = np.divmod(np.arange(q.shape[1]), width)
        way = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns)
        slopes = np.reshape(np.asarray(self._slopes()), (1, self.num_heads, 1, 1))
        return b.attention(q, k, v, bias=b.constant(-slopes) * b.constant(way[None, None].astype(np.float32)))

    def _decomposed(self, b: Builder, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention along each row, and along each column to its result."""
        (batch, _, heads, size), (height, width) = q.shape, grid
        along = [b.reshape(x, batch * height, width, heads, size) for x in (q, k, v)]
        v = b.attention(*along, alibi=self._slopes())
        along = [
            b.reshape(
                b.transpose(b.reshape(x, batch, height, width, heads, size), 0, 2, 1, 3, 4),
                batch * width,
                height,
                heads,
                size,
            )
            for x in (q, k, v)
        ]
        o = b.reshape(b.attention(*along, alibi=self._slopes()), batch, width, height, heads, size)
        return b.transpose(o, 0, 2, 1, 3, 4)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        q, k, v = (x @ params[name] + params[f"{name}_bias"] for name in "qkv")
        near = reference.convolve(v, params["kernel"], groups=d_model) + params["kernel_bias"]
        q, k, v = (np.reshape(z, (batch, height, width, self.num_heads, -1)) for z in (q, k, v))
        if self.rotary:
            q, k = self._turned(q), self._turned(k)
        if self.decomposed:
            line = np.array([[place] for place in range(max(height, width))])
            v = np.stack([self._attend(q[:, i], k[:, i], v[:, i], line[:width]) for i in range(height)], axis=1)
            across = [self._attend(q[:, :, j], k[:, :, j], v[:, :, j], line[:height]) for j in range(width)]
            o = np.stack(across, axis=2)
        else:
            places = np.array([(i, j) for i in range(height) for j in range(width)])
            q, k, v = (np.reshape(z, (batch, height * width, self.num_heads, -1)) for z in (q, k, v))
            o = self._attend(q, k, v, places)
        return (np.reshape(o, x.shape) + near) @ params["out"] + params["out_bias"]

    def _turned(self, x: Array) -> Array:
        """Each pair (x_i, x_{i + K/2}) as a complex number turned by its pixel's number."""
        _, height, width, _, size = x.shape
        half, result = size // 2, np.empty_like(x)
        for i in range(half):
            speed = _TURNS ** -(i / max(half - 1, 1))
            turns = np.exp(1j * speed * np.reshape(np.array(range(height * width)), (1, height, width, 1)))
            turned = (x[..., i] + 1j * x[..., i + half]) * turns
            result[..., i], result[..., i + half] = turned.real, turned.imag
        return result

    def _attend(self, q: Array, k: Array, v: Array, places: Array) -> Array:
        """Attention among tokens `[B, T, H, K]` at places `[T, axes]`."""
        o = np.zeros_like(v)
        for head in range(self.num_heads):
            exponent = self.decay_start + self.decay_range * head / self.num_heads
            decay = float(np.float32(np.log(1.0 - 2.0**-exponent)))  # as constants are kept
            for t in range(len(places)):
                way = np.abs(places - places[t]).sum(axis=-1)
                scores = (q[:, t, None, head] * k[:, :, head]).sum(axis=-1) / q.shape[-1] ** 0.5
                weights = reference.softmax(scores + decay * way)
                o[:, t, head] = (weights[:, :, None] * v[:, :, head]).sum(axis=1)
        return o
