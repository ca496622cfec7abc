"""Attention to near details and to a blurred whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces import convolutions, reference

_HIDDEN = -1e9  # added to the scores of keys that only fill up a window


def _low_only(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The low heads' projections under the names of plain attention."""
    return {name.removeprefix("low_"): array for name, array in params.items()}


def _high_only(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The high heads' projections under the names of attention in windows."""
    return {name.removeprefix("high_"): array for name, array in params.items()}


class HiloAttention(TokenMixer):
    """Some heads attend within small windows, the others to averages of such windows (Pan et al. 2022, HiLo).

    Of H heads the low ones, int(alpha * H), take queries from every pixel and keys and values from the means of windows
    of S x S pixels; the high ones do plain attention within each window. Each group has its own projections, and their
    outputs `[.., share of D]` stand beside each other, high before low. At S = 1 all heads are low: plain attention.
    Zeros fill up the last windows; averages count them, attention does not see them. T^2 / S^2 in tokens.
    """

    paper = "Pan, Cai, Zhuang 2022, Fast Vision Transformers with HiLo Attention, arXiv 2205.13213"
    spatial = True
    causality = "bidirectional"
    growth = 2.0
    cases = (
        Case({"num_heads": 4, "window": 2, "alpha": 0.5}, grid=(4, 6)),
        Case({"num_heads": 3, "window": 2, "alpha": 0.9}, grid=(5, 3), d_model=6, batch=1),
        Case({"num_heads": 2, "window": 3, "alpha": 0.0}, grid=(4, 5), d_model=6),
        Case({"num_heads": 2, "window": 2, "alpha": 1.0, "bias": True}, grid=(3, 4), d_model=6),
    )
    limits = (
        Limit(
            "windows of one pixel are multi-head attention",
            Case({"num_heads": 3, "window": 1, "alpha": 0.5, "bias": True}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            adapt=_low_only,
        ),
        Limit(
            "without low heads it is attention in windows",
            Case({"num_heads": 3, "window": 2, "alpha": 0.0, "bias": True}, grid=(5, 4)),
            "window_attention",
            {"num_heads": 3, "window": 2, "relative_position": False},
            adapt=_high_only,
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    window: int = option(2, minimum=1, maximum=64, doc="Height and width of a window, pixels.")
    alpha: float = option(0.5, minimum=0.0, maximum=1.0, doc="Share of the heads that attend to averages.")
    bias: bool = option(False, doc="Add learned biases to queries, keys and values too.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None

    def growth_exponent(self) -> float:
        return 2.0 if self._low_heads else 1.0

    @property
    def _low_heads(self) -> int:
        return self.num_heads if self.window == 1 else int(self.alpha * self.num_heads)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        low, parts = self._low_heads, list[Tensor]()
        if low < self.num_heads:
            parts.append(self._high(b, x, self.num_heads - low))
        if low:
            parts.append(self._low(b, x, low))
        return parts[0] if len(parts) == 1 else b.concat(3, *parts)

    def _project(self, b: Builder, x: Tensor, name: str, heads: int, d_model: int) -> Tensor:
        """Heads `[B, T, H, K]` of tokens `[B, T, D]`."""
        axes = (Axis("heads", heads), Axis("head_dim", d_model // self.num_heads))
        return b.split_heads(b.linear(x, name, axes, bias=self.bias), heads)

    def _output(self, b: Builder, o: Tensor, name: str) -> Tensor:
        heads = (Axis("heads", o.shape[2]), Axis("head_dim", o.shape[3]))
        share = Axis("share", o.shape[2] * o.shape[3])
        y = b.matmul(b.merge_heads(o), b.parameter(name, (heads, (share,))))
        return y + b.parameter(f"{name}_bias", ((share,),), "constant(0)")

    def _low(self, b: Builder, x: Tensor, heads: int) -> Tensor:
        (batch, height, width, d_model), side = x.shape, self.window
        tokens, means = b.reshape(x, batch, height * width, d_model), x
        if side > 1:
            means = b.pool(convolutions.fill(b, x, side), Pool("average", (side, side), (side, side), ((0, 0), (0, 0))))
        means = b.reshape(means, batch, means.shape[1] * means.shape[2], d_model)
        q = self._project(b, tokens, "low_q", heads, d_model)
        k, v = (self._project(b, means, f"low_{name}", heads, d_model) for name in "kv")
        return b.reshape(self._output(b, b.attention(q, k, v), "low_out"), batch, height, width, -1)

    def _high(self, b: Builder, x: Tensor, heads: int) -> Tensor:
        (batch, height, width, d_model), side = x.shape, self.window
        x = convolutions.fill(b, x, side)
        rows, columns = x.shape[1] // side, x.shape[2] // side
        tiles = b.transpose(b.reshape(x, batch, rows, side, columns, side, d_model), 0, 1, 3, 2, 4, 5)
        tiles = b.reshape(tiles, batch * rows * columns, side * side, d_model)
        q, k, v = (self._project(b, tiles, f"high_{name}", heads, d_model) for name in "qkv")
        y = self._output(b, b.attention(q, k, v, bias=self._hidden(b, batch, height, width)), "high_out")
        y = b.transpose(b.reshape(y, batch, rows, columns, side, side, y.shape[-1]), 0, 1, 3, 2, 4, 5)
        y = b.reshape(y, batch, rows * side, columns * side, y.shape[-1])
        return b.slice(b.slice(y, 1, 0, height), 2, 0, width)

    def _hidden(self, b: Builder, batch: int, height: int, width: int) -> Tensor | None:
        """What hides the keys that only fill up windows, `[batch * windows, 1, 1, size]`."""
        side = self.window
        if height % side == 0 and width % side == 0:
            return None
        filled = np.pad(np.zeros((height, width)), ((0, -height % side), (0, -width % side)), constant_values=_HIDDEN)
        tiles = np.reshape(filled, (filled.shape[0] // side, side, filled.shape[1] // side, side))
        return b.constant(np.tile(np.reshape(np.swapaxes(tiles, 1, 2), (-1, 1, 1, side * side)), (batch, 1, 1, 1)))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        side, low = self.window, self._low_heads
        padded = np.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        corners = [(i, j) for i in range(0, height, side) for j in range(0, width, side)]
        parts: list[Array] = []
        if low < self.num_heads:
            part = np.zeros((batch, height, width, (self.num_heads - low) * d_model // self.num_heads))
            for i, j in corners:
                window = x[:, i : i + side, j : j + side]
                tokens = np.reshape(window, (batch, -1, d_model))
                seen = self._attend(params, "high", tokens, tokens, self.num_heads - low)
                part[:, i : i + side, j : j + side] = np.reshape(seen, (*window.shape[:3], -1))
            parts.append(part)
        if low:
            means = np.stack([padded[:, i : i + side, j : j + side].mean(axis=(1, 2)) for i, j in corners], axis=1)
            seen = self._attend(params, "low", np.reshape(x, (batch, -1, d_model)), means, low)
            parts.append(np.reshape(seen, (batch, height, width, -1)))
        return np.concatenate(parts, axis=-1)

    def _attend(self, params: Mapping[str, Array], group: str, x: Array, z: Array, heads: int) -> Array:
        """Queries from x `[B, T, D]`, keys and values from z `[B, S, D]`."""
        q, k, v = (
            reference.split_heads(
                source @ params[f"{group}_{name}"] + params.get(f"{group}_{name}_bias", np.zeros(1)), heads
            )
            for name, source in (("q", x), ("k", z), ("v", z))
        )
        weights = reference.softmax(np.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5)
        o = reference.merge_heads(np.einsum("bhts,bshk->bthk", weights, v))
        return o @ params[f"{group}_out"] + params[f"{group}_out_bias"]
