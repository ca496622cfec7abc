"""Attention in windows whose heads each get a share of the channels and the result of the head before."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, offsets, reference


def _as_softmax_attention(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Parameters of one head with its batch norms and its convolution of one pixel folded into the products."""
    folded: dict[str, Array] = {}
    for name in ("q", "k", "v"):
        folded[name], folded[f"{name}_bias"] = reference.fold_batch_norm(params, f"{name}0")
    factor, shift = reference.fold_batch_norm(params, "q0_depthwise")
    folded["q"], folded["q_bias"] = folded["q"] * factor[0, 0, 0], folded["q_bias"] * factor[0, 0, 0] + shift
    folded["out"], folded["out_bias"] = reference.fold_batch_norm(params, "out")
    return folded


class CascadedGroupAttention(TokenMixer):
    """Cascaded group attention in windows (Liu et al. 2023, EfficientViT).

    Channels x = [x_1 .. x_H]; head h reads z_h = x_h + o_{h-1}, o_0 = 0: q = bn(depthwise(bn(z W_q))), k = bn(z W_k),
    v = bn(z W_v), o_h = softmax(q k^T / sqrt(K) + table_h[|rows|, |columns| apart]) v;
    y = bn(relu([o_1 .. o_H]) W_out).
    Windows of at most W x W pixels; zeros fill up those at the border and are attended, as published.
    D (2 K + D / H) + D^2 parameters beside norms, windows and table. Linear in the number of tokens.
    """

    paper = (
        "Liu et al. 2023, EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, "
        "arXiv 2305.07027"
    )
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3, "key_dim": 5, "window": 4, "kernel_size": 3}, grid=(3, 4), d_model=6),
        Case({"num_heads": 2, "key_dim": 3, "window": 3}, grid=(4, 5), d_model=4, batch=1),
        Case({"num_heads": 1, "key_dim": 4, "window": 2, "kernel_size": 1}, grid=(3, 3), d_model=5),
    )
    limits = (
        Limit(
            "one head in a window over all pixels, with values above zero, is softmax attention",
            Case({"num_heads": 1, "key_dim": 12, "window": 5, "kernel_size": 1}, grid=(3, 4)),
            "softmax_attention",
            {"num_heads": 1, "bias": True, "causal": False},
            values={"offsets": 0.0, "v0_norm_bias": 60.0},
            adapt=_as_softmax_attention,
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=64, doc="Heads, each with its share of the channels.")
    key_dim: int = option(16, minimum=1, maximum=1024, doc="Size of queries and keys.")
    window: int = option(7, minimum=1, maximum=1024, doc="Height and width of a window, pixels.")
    kernel_size: int = option(5, minimum=1, maximum=31, doc="Window of the convolution of queries, odd.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None if self.kernel_size % 2 else f"kernel_size {self.kernel_size} is even"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        rows, columns = min(self.window, height), min(self.window, width)
        down, across = -(-height // rows), -(-width // columns)
        x = x if down * rows == height else b.pad(x, 1, 0, down * rows - height)
        x = x if across * columns == width else b.pad(x, 2, 0, across * columns - width)
        tiles = b.transpose(b.reshape(x, batch, down, rows, across, columns, d_model), 0, 1, 3, 2, 4, 5)
        y = self._attend(b, b.reshape(tiles, batch * down * across, rows, columns, d_model))
        y = b.transpose(b.reshape(y, batch, down, across, rows, columns, d_model), 0, 1, 3, 2, 4, 5)
        y = b.reshape(y, batch, down * rows, across * columns, d_model)
        y = y if down * rows == height else b.slice(y, 1, 0, height)
        return y if across * columns == width else b.slice(y, 2, 0, width)

    def _attend(self, b: Builder, x: Tensor) -> Tensor:
        """The heads one after the other, on windows `[N, rows, columns, D]`."""
        windows, rows, columns, d_model = x.shape
        size, tokens = d_model // self.num_heads, rows * columns
        biases = offsets.offset_bias(b, "offsets", self.num_heads, rows, columns)
        outputs: list[Tensor] = []
        for head, part in enumerate(b.split(x, -1, *[size] * self.num_heads)):
            z = part + outputs[-1] if outputs else part
            q = self._product(b, z, f"q{head}", self.key_dim)
            q = convolutions.conv_norm(
                b, q, f"q{head}_depthwise", self.key_dim, window=self.kernel_size, groups=self.key_dim
            )
            k, v = self._product(b, z, f"k{head}", self.key_dim), self._product(b, z, f"v{head}", size)
            q, k, v = (b.reshape(each, windows, tokens, 1, each.shape[-1]) for each in (q, k, v))
            o = b.attention(q, k, v, bias=b.slice(biases, 1, head, head + 1))
            outputs.append(b.reshape(o, windows, rows, columns, size))
        merged = b.concat(-1, *outputs) if len(outputs) > 1 else outputs[0]
        return self._product(b, b.relu(merged), "out", d_model)

    def _product(self, b: Builder, x: Tensor, name: str, outputs: int) -> Tensor:
        return b.batch_norm(b.linear(x, name, (Axis("channels", outputs),)), f"{name}_norm")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        _, height, width, _ = x.shape
        rows, columns = min(self.window, height), min(self.window, width)
        padded = np.pad(x, ((0, 0), (0, -height % rows), (0, -width % columns), (0, 0)))
        y = np.zeros_like(padded)
        for top in range(0, padded.shape[1], rows):
            for left in range(0, padded.shape[2], columns):
                place = (slice(None), slice(top, top + rows), slice(left, left + columns))
                y[place] = self._window_reference(params, padded[place])
        return y[:, :height, :width]

    def _window_reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, rows, columns, d_model = x.shape
        size, tokens = d_model // self.num_heads, rows * columns
        outputs: list[Array] = []
        for head in range(self.num_heads):
            z = x[..., head * size : (head + 1) * size] + (outputs[-1] if outputs else 0.0)
            q, k, v = (
                reference.batch_norm(params, f"{name}{head}_norm", z @ params[f"{name}{head}"]) for name in "qkv"
            )
            q = reference.convolve(q, params[f"q{head}_depthwise"], groups=self.key_dim)
            q = reference.batch_norm(params, f"q{head}_depthwise_norm", q)
            k, v = np.reshape(k, (batch, tokens, -1)), np.reshape(v, (batch, tokens, -1))
            o = np.zeros((batch, rows, columns, size))
            for row in range(rows):
                for column in range(columns):
                    scores = np.einsum("bk,bsk->bs", q[:, row, column], k) / self.key_dim**0.5
                    scores += offsets.offset_bias_reference(params["offsets"], head, (row, column), columns, tokens)
                    o[:, row, column] = np.einsum("bs,bsv->bv", reference.softmax(scores), v)
            outputs.append(o)
        merged = np.maximum(np.concatenate(outputs, axis=-1), 0.0)
        return reference.batch_norm(params, "out_norm", merged @ params["out"])
