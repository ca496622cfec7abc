"""Attention whose weights a pixel says by itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces import reference


def _values_only(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Attention of a single token: its queries and keys do not matter."""
    v, zero = params["v"], np.zeros_like(params["out_bias"])
    return {**params, "q": v, "k": v, "q_bias": zero, "k_bias": zero, "v_bias": zero}


class OutlookAttention(TokenMixer):
    """A linear map of each pixel gives the weights within its window (Yuan et al. 2022, VOLO).

    Every S-th pixel n, rows and columns, has the K x K pixels around it as its window. In each of H heads of size E
    A_n = softmax_s((mean of the S x S pixels at n) W_a + b_a) / sqrt(E)), `[K^2, K^2]`; token t of the window receives
    sum_s A_n[t, s] v_s, v = x W_v, and what it receives from all windows is summed: y = (sums) W_out + b_out. Zeros
    around the image. 2 D^2 + D H K^4 parameters. Linear in the number of tokens.
    """

    paper = "Yuan et al. 2022, VOLO: Vision Outlooker for Visual Recognition, arXiv 2106.13112"
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3}, grid=(4, 6)),
        Case({"num_heads": 2, "stride": 1}, grid=(3, 5), d_model=6, batch=1),
        Case({"num_heads": 1, "stride": 2}, grid=(5, 3), d_model=4),
        Case({"num_heads": 1, "stride": 3, "window": 5}, grid=(7, 5), d_model=3, batch=1),
    )
    limits = (
        Limit(
            "a window of one pixel is attention of one token",
            Case({"num_heads": 3, "window": 1, "stride": 1}, grid=(1, 1)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            adapt=_values_only,
        ),
    )

    num_heads: int = option(6, minimum=1, maximum=1024, doc="Heads.")
    window: int = option(3, minimum=1, maximum=15, doc="Height and width of a window, pixels, an odd number.")
    stride: int = option(2, minimum=1, maximum=15, doc="Pixels from one window to the next.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.window % 2 == 0:
            return f"a window of {self.window} has no centre"
        return None if self.stride <= self.window else f"a stride of {self.stride} leaves pixels out"

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        size, tokens = self.window**2, height * width
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        unfold, fold = self._tables(height, width)
        windows = len(unfold)
        v = b.pad(b.reshape(b.linear(x, "v", heads), batch, tokens, d_model), 1, 0, 1)
        v = b.reshape(b.gather(v, b.constant(np.reshape(unfold, (1, -1, 1))), 1), batch * windows, size, *_sizes(heads))
        pairs = (Axis("heads", self.num_heads), Axis("receivers", size), Axis("givers", size))
        scale = b.rsqrt(b.constant(float(heads[1].size)))
        scores = b.linear(self._means(b, x), "weights", pairs, bias=True) * scale
        weights = b.softmax(b.reshape(scores, batch * windows, self.num_heads, size, size))
        given = b.transpose(b.matmul(weights, b.transpose(v, 0, 2, 1, 3)), 0, 2, 1, 3)
        given = b.pad(b.reshape(given, batch, windows * size, d_model), 1, 0, 1)
        met = b.gather(given, b.constant(np.reshape(fold, (1, -1, 1))), 1)
        y = b.sum(b.reshape(met, batch, height, width, fold.shape[1], d_model), 3)
        y = b.matmul(y, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def _means(self, b: Builder, x: Tensor) -> Tensor:
        """Averages of S x S pixels, those at the border of what there is."""
        if self.stride == 1:
            return x
        missing = tuple((0, -size % self.stride) for size in x.shape[1:3])
        return b.pool(x, Pool("average", (self.stride,) * 2, (self.stride,) * 2, missing))

    def _tables(self, height: int, width: int) -> tuple[Array, Array]:
        """Where each window reads, `[windows, K^2]`, and where each pixel reads, `[T, most]`; the last for zeros."""
        reach, nothing = self.window // 2, height * width
        corners = itertools.product(range(0, height, self.stride), range(0, width, self.stride))
        steps = list(itertools.product(range(-reach, reach + 1), repeat=2))
        seen = [[(i + u, j + w) for u, w in steps] for i, j in corners]
        unfold = [[i * width + j if 0 <= i < height and 0 <= j < width else nothing for i, j in own] for own in seen]
        met: list[list[int]] = [[] for _ in range(nothing)]
        for number, place in enumerate(itertools.chain.from_iterable(unfold)):
            if place != nothing:
                met[place].append(number)
        most, last = max(map(len, met)), len(unfold) * len(steps)
        return np.array(unfold), np.array([own + [last] * (most - len(own)) for own in met])

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        reach, heads, size = self.window // 2, self.num_heads, self.window**2
        v = np.reshape(x @ params["v"], (batch, height, width, heads, -1))
        v = np.pad(v, ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))
        sums = np.zeros_like(v)
        for i in range(0, height, self.stride):
            for j in range(0, width, self.stride):
                mean = x[:, i : i + self.stride, j : j + self.stride].mean(axis=(1, 2))
                scores = np.reshape(mean @ params["weights"] + params["weights_bias"], (batch, heads, size, size))
                weights = reference.softmax(scores / (d_model // heads) ** 0.5)
                window = np.reshape(v[:, i : i + self.window, j : j + self.window], (batch, size, heads, -1))
                given = np.einsum("bhts,bshe->bthe", weights, window)
                sums[:, i : i + self.window, j : j + self.window] += np.reshape(
                    given, (batch, self.window, self.window, heads, -1)
                )
        sums = np.reshape(sums[:, reach : reach + height, reach : reach + width], x.shape)
        return sums @ params["out"] + params["out_bias"]


def _sizes(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    return tuple(axis.size for axis in axes)
