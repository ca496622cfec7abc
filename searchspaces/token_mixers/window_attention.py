"""Attention in windows of an image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference

_HIDDEN = -1e9  # added to the scores of keys that a query must not see


class WindowAttention(TokenMixer):
    """Attention within windows of M x M pixels, shifted in every other layer (Liu et al. 2021, Swin).

    The image, moved up and left by `shift` and wrapped around, falls into windows. o_t = sum_s softmax_s(q_t . k_s /
    sqrt(K) + table[h, row_t - row_s, column_t - column_s]) v_s over the tokens s of t's window that wrapping did not
    bring there; y = concat_h(o) W_out. The table is `[(2 M - 1)^2, H]`. Windows never exceed the image, and along an
    axis that one window covers nothing is shifted; pixels that fill up the last windows are not seen. 4 D^2
    parameters besides the table. Linear in the number of tokens: M^2 keys each.
    """

    paper = "Liu et al. 2021, Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030"
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3, "window": 2}, grid=(4, 6)),
        Case({"num_heads": 3, "window": 3, "shift": 1}, grid=(5, 4)),
        Case({"num_heads": 2, "window": 4, "shift": 2, "bias": False}, grid=(3, 9), d_model=6, batch=1),
        Case({"num_heads": 1, "window": 2, "shift": 1, "relative_position": False}, grid=(4, 4), d_model=5),
    )
    limits = (
        Limit(
            "a window over the whole image, its table zero, is full attention",
            Case({"num_heads": 3, "window": 5, "shift": 2}, grid=(5, 4)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            values={"relative_position": 0.0},
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    window: int = option(7, minimum=2, maximum=1024, doc="Height and width of a window, pixels.")
    shift: int = option(0, minimum=0, doc="Pixels that windows are moved by; half a window in every other layer.")
    relative_position: bool = option(True, doc="Learn a score for each distance within a window.")
    bias: bool = option(True, doc="Add learned biases to queries, keys, values and output.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.shift >= self.window:
            return f"a shift of {self.shift} is no part of a window of {self.window}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        places, hidden = self._layout(height, width)
        windows, size = places.shape
        flat = b.reshape(x, batch, height * width, d_model)
        order = b.constant(np.reshape(np.maximum(places, 0), (1, -1, 1)))
        tiles = b.reshape(b.gather(flat, order, 1), batch * windows, size, d_model)
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        q, k, v = (b.split_heads(b.linear(tiles, name, heads, bias=self.bias), self.num_heads) for name in "qkv")
        o = b.merge_heads(b.attention(q, k, v, bias=self._scores(b, hidden, batch, (height, width))))
        y = b.matmul(o, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        y = y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)") if self.bias else y
        back = np.zeros(height * width, np.int64)
        back[places[places >= 0]] = np.flatnonzero(places.ravel() >= 0)
        y = b.gather(b.reshape(y, batch, windows * size, d_model), b.constant(np.reshape(back, (1, -1, 1))), 1)
        return b.reshape(y, batch, height, width, d_model)

    def _layout(self, height: int, width: int) -> tuple[Array, Array]:
        """Which token stands where in which window, `[windows, size]`, -1 for none, and pairs that must not meet."""
        axes = [self._axis(count) for count in (height, width)]
        (rows, row_parts), (columns, column_parts) = axes
        places = rows[:, None, :, None] * width + columns[None, :, None, :]
        none = (rows < 0)[:, None, :, None] | (columns < 0)[None, :, None, :]
        parts = row_parts[:, None, :, None] * 3 + column_parts[None, :, None, :]
        size = rows.shape[1] * columns.shape[1]
        parts = np.reshape(parts, (-1, size))
        return np.reshape(np.where(none, -1, places), (-1, size)), parts[:, :, None] != parts[:, None, :]

    def _axis(self, count: int) -> tuple[Array, Array]:
        """Along an axis: coordinates in each window, -1 for none, and 0, 1 for wrapped or 2 for none."""
        window = min(self.window, count)
        padded = -(-count // window) * window
        shift = self.shift if count > self.window else 0
        coordinates = (np.arange(padded) + shift) % padded
        parts = np.where(coordinates >= count, 2, np.where(coordinates < shift, 1, 0))
        return np.reshape(np.where(parts == 2, -1, coordinates), (-1, window)), np.reshape(parts, (-1, window))

    def _scores(self, b: Builder, hidden: Array, batch: int, grid: tuple[int, int]) -> Tensor | None:
        """What is added to the scores, `[1 or batch * windows, 1 or H, size, size]`."""
        windows, size, _ = hidden.shape
        bias = self._table(b, grid) if self.relative_position else None
        if not hidden.any():
            return bias
        mask = b.constant(np.where(hidden, _HIDDEN, 0.0)[:, None])
        bias = mask if bias is None else bias + mask
        if batch == 1:
            return bias
        heads = bias.shape[1]
        every = b.broadcast(b.reshape(bias, 1, windows, heads, size, size), batch, windows, heads, size, size)
        return b.reshape(every, batch * windows, heads, size, size)

    def _table(self, b: Builder, grid: tuple[int, int]) -> Tensor:
        """Learned scores by distance, `[1, H, size, size]`."""
        height, width = (min(self.window, count) for count in grid)
        axes = ((Axis("distance", (2 * height - 1) * (2 * width - 1)),), (Axis("heads", self.num_heads),))
        table = b.parameter("relative_position", axes, "normal(0.02)")
        rows, columns = np.divmod(np.arange(height * width), width)
        down = rows[:, None] - rows[None, :] + height - 1
        right = columns[:, None] - columns[None, :] + width - 1
        chosen = b.take(table, b.constant(np.ravel(down * (2 * width - 1) + right)))
        return b.reshape(b.transpose(chosen, 1, 0), 1, self.num_heads, height * width, height * width)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        q, k, v = (
            np.reshape(x @ params[name] + params.get(f"{name}_bias", 0.0), (batch, height, width, self.num_heads, -1))
            for name in "qkv"
        )
        o = np.zeros_like(q)
        for i in range(height):
            for j in range(width):
                rows = [u for u in range(height) if self._meet(i, u, height)]
                seen = [(u, w) for u in rows for w in range(width) if self._meet(j, w, width)]
                scores = np.stack([(q[:, i, j] * k[:, u, w]).sum(axis=-1) for u, w in seen], axis=-1)
                scores = scores / (d_model // self.num_heads) ** 0.5
                if self.relative_position:
                    scores = scores + self._learned(params, [(i - u, j - w) for u, w in seen], (height, width))
                weights = reference.softmax(scores)
                o[:, i, j] = sum(weights[:, :, n, None] * v[:, u, w] for n, (u, w) in enumerate(seen))
        return np.reshape(o, x.shape) @ params["out"] + params.get("out_bias", 0.0)

    def _meet(self, one: int, other: int, count: int) -> bool:
        """Whether two coordinates share a window without wrapping."""
        if count <= self.window:
            return True
        first, second = one - self.shift, other - self.shift
        windows = -(-count // self.window)
        return (first < 0) == (second < 0) and first // self.window % windows == second // self.window % windows

    def _learned(self, params: Mapping[str, Array], steps: list[tuple[int, int]], grid: tuple[int, int]) -> Array:
        """The table's entries at distances, `[H, distances]`."""
        height, width = (min(self.window, count) for count in grid)
        table = np.reshape(params["relative_position"], (2 * height - 1, 2 * width - 1, self.num_heads))
        return np.stack([table[down + height - 1, right + width - 1] for down, right in steps], axis=-1)
