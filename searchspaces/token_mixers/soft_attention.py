"""Attention by a Gaussian kernel, without softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Limit, TokenMixer, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces import reference

_START = 1.8  # of the published code: times 1 / (largest row sum)^2 it makes the first inverse, below the bound 2


def _values_only(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """Attention of a single token: its keys do not matter."""
    return {**params, "k": params["q"], "k_bias": params["q_bias"]}


class SoftAttention(TokenMixer):
    """Softmax-free attention of linear cost (Lu et al. 2021, SOFT).

    In each of H heads of size E, with q = (x W_q + b_q) / E^(1/4) as queries and keys: S(a, c) = exp(-|a - c|^2 / 2),
    landmarks l are the M x M parts of the image, each under one matrix (shared by the heads), layer norm and GELU, or
    the means of parts. o = S(q, l) A^+ S(l, q) v with A = S(l, l); y = (concat_h(o) + conv(v)) W_out + b_out, conv a
    depthwise window with one kernel a head. The inverse of A + ridge I is Newton's: V <- 2 V - V A V. With `normalised`
    A^+ stands between D^(-1/2), D the row sums of A. Zeros fill up the last parts. Linear in T; M^6 for the inverse.
    """

    paper = (
        "Lu et al. 2021, SOFT: Softmax-free Transformer with Linear Complexity, arXiv 2110.11945; "
        "Lu et al. 2022, Softmax-free Linear Transformers, arXiv 2207.03341"
    )
    spatial = True
    causality = "bidirectional"
    cases = (
        Case({"num_heads": 3, "landmarks": 2}, grid=(4, 6)),
        Case({"num_heads": 2, "landmarks": 2, "normalised": True, "kernel_size": 5}, grid=(5, 3), d_model=6, batch=1),
        Case({"num_heads": 1, "landmarks": 3, "landmark": "mean", "newton_steps": 12}, grid=(6, 4), d_model=5),
    )
    limits = (
        Limit(
            "a single token attends itself",
            Case({"num_heads": 3, "landmarks": 1, "landmark": "mean", "ridge": 0.0}, grid=(1, 1)),
            "softmax_attention",
            {"num_heads": 3, "bias": True, "causal": False},
            values={"kernel": 0.0},
            adapt=_values_only,
        ),
    )

    num_heads: int = option(2, minimum=1, maximum=1024, doc="Heads.")
    landmarks: int = option(7, minimum=1, maximum=256, doc="Landmarks along each side of the image.")
    landmark: Literal["conv", "mean"] = option("conv", choices=("conv", "mean"), doc="What a landmark is made by.")
    newton_steps: int = option(20, minimum=1, maximum=100, doc="Steps of Newton's inverse.")
    ridge: float = option(0.01, minimum=0.0, maximum=1.0, doc="Added to the diagonal before it is inverted.")
    kernel_size: int = option(3, minimum=1, maximum=31, doc="Height and width of the window on the values, pixels.")
    normalised: bool = option(False, doc="Scale the inverse by the row sums of the landmarks' kernel.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        batch, height, width, d_model = x.shape
        heads = (Axis("heads", self.num_heads), Axis("head_dim", d_model // self.num_heads))
        count, size = self.num_heads, heads[1].size
        q, v = (b.linear(x, name, heads, bias=True) for name in "qv")
        near = self._near(b, v, heads)
        q, v = (
            b.reshape(
                b.transpose(b.reshape(z, batch, height, width, count, size), 0, 3, 1, 2, 4), -1, height, width, size
            )
            for z in (q, v)
        )
        q = q / b.sqrt(b.sqrt(b.constant(float(size))))
        marks = self._landmarks(b, q, size)
        q, v = (b.reshape(z, batch * count, height * width, size) for z in (q, v))
        across, among = _kernel(b, q, marks), _kernel(b, marks, marks)
        inverse = self._inverse(b, among)
        if self.normalised:
            share = b.rsqrt(b.sum(among, -1, keepdims=True))
            inverse = share * inverse * b.transpose(share, 0, 2, 1)
        o = b.matmul(across, b.matmul(inverse, b.matmul(across, v, transpose_a=True)))
        o = b.transpose(b.reshape(o, batch, count, height, width, size), 0, 2, 3, 1, 4)
        y = b.matmul(b.reshape(o, *x.shape) + near, b.parameter("out", (heads, (Axis("d_model", d_model),))))
        return y + b.parameter("out_bias", ((Axis("d_model", d_model),),), "constant(0)")

    def _near(self, b: Builder, v: Tensor, heads: tuple[Axis, Axis]) -> Tensor:
        """The values `[B, H, W, D]` under each head's window."""
        side, (count, size) = self.kernel_size, (axis.size for axis in heads)
        window = ((Axis("height", side),), (Axis("width", side),), (Axis("group", 1),), (heads[0],))
        kernel = b.reshape(b.parameter("kernel", window), side, side, 1, count, 1)
        kernel = b.reshape(b.broadcast(kernel, side, side, 1, count, size), side, side, 1, count * size)
        around = ((side // 2, (side - 1) // 2),) * 2
        return b.conv(v, kernel, padding=around, groups=count * size)

    def _landmarks(self, b: Builder, q: Tensor, size: int) -> Tensor:
        """Landmarks `[B * heads, M^2, K]` of queries `[B * heads, H, W, K]`."""
        part = tuple(-(-count // self.landmarks) for count in q.shape[1:3])
        fill = tuple((0, -count % side) for count, side in zip(q.shape[1:3], part, strict=True))
        if self.landmark == "mean":
            marks = b.pool(q, Pool("average", part, part, fill))
            return b.reshape(marks, marks.shape[0], -1, size)
        axes = ((Axis("height", part[0]),), (Axis("width", part[1]),), (Axis("channels", size),), (Axis("mark", size),))
        marks = b.conv(q, b.parameter("landmark", axes), strides=part, padding=fill)
        scale = b.parameter("norm_scale", ((Axis("mark", size),),), "constant(1)")
        bias = b.parameter("norm_bias", ((Axis("mark", size),),), "constant(0)")
        return b.gelu(b.layer_norm(b.reshape(marks, marks.shape[0], -1, size), scale, bias))

    def _inverse(self, b: Builder, matrix: Tensor) -> Tensor:
        """Newton's inverse of matrices `[N, M^2, M^2]`."""
        largest = b.max(b.sum(matrix, -1, keepdims=True), -2, keepdims=True)
        if self.ridge:
            size = matrix.shape[-1]
            matrix = matrix + b.constant(np.eye(size)[None]) * self.ridge
        inverse = matrix / b.square(largest) * _START
        for _ in range(self.newton_steps):
            inverse = inverse * 2.0 - b.matmul(b.matmul(inverse, matrix), inverse)
        return inverse

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        batch, height, width, d_model = x.shape
        size = d_model // self.num_heads
        q, v = (x @ params[name] + params[f"{name}_bias"] for name in "qv")
        kernel = np.repeat(params["kernel"], size, axis=-1)
        low, high = self.kernel_size // 2, (self.kernel_size - 1) // 2
        padded = np.pad(v, ((0, 0), (low, high), (low, high), (0, 0)))
        y = reference.convolve(padded, kernel, padding=0, groups=d_model)
        for head in range(self.num_heads):
            own = slice(head * size, (head + 1) * size)
            for example in range(batch):
                o = self._seen(params, q[example, ..., own] / size**0.25, np.reshape(v[example, ..., own], (-1, size)))
                y[example, ..., own] += np.reshape(o, (height, width, size))
        return y @ params["out"] + params["out_bias"]

    def _seen(self, params: Mapping[str, Array], q: Array, v: Array) -> Array:
        """What one head's tokens see, from queries `[H, W, K]` and values `[T, K]`."""
        marks = self._marks(params, q)
        across, among = _gaussian(np.reshape(q, v.shape), marks), _gaussian(marks, marks)
        matrix: Array = among + float(np.float32(self.ridge)) * np.eye(len(marks))
        inverse: Array = float(np.float32(_START)) * matrix / among.sum(axis=-1).max() ** 2
        for _ in range(self.newton_steps):
            inverse = 2.0 * inverse - inverse @ matrix @ inverse
        if self.normalised:
            inverse = inverse / np.sqrt(np.einsum("i,j->ij", among.sum(axis=-1), among.sum(axis=-1)))
        return across @ inverse @ np.swapaxes(across, 0, 1) @ v

    def _marks(self, params: Mapping[str, Array], q: Array) -> Array:
        """Landmarks `[M^2, K]` of one head's queries `[H, W, K]`, part by part."""
        down, right = (-(-count // self.landmarks) for count in q.shape[:2])
        marks: list[Array] = []
        for i in range(0, q.shape[0], down):
            for j in range(0, q.shape[1], right):
                part = q[i : i + down, j : j + right]
                if self.landmark == "mean":
                    marks.append(part.mean(axis=(0, 1)))
                    continue
                kernel = params["landmark"][: part.shape[0], : part.shape[1]]
                marks.append(np.einsum("ijk,ijkm->m", part, kernel))
        if self.landmark == "mean":
            return np.stack(marks)
        return reference.gelu(reference.layer_norm(np.stack(marks)) * params["norm_scale"] + params["norm_bias"])


def _kernel(b: Builder, x: Tensor, z: Tensor) -> Tensor:
    """exp(-|x_t - z_s|^2 / 2) of x `[N, T, K]` and z `[N, S, K]`."""
    lengths = b.sum(b.square(x), -1, keepdims=True) + b.transpose(b.sum(b.square(z), -1, keepdims=True), 0, 2, 1)
    return b.exp(b.matmul(x, z, transpose_b=True) - lengths * 0.5)


def _gaussian(x: Array, z: Array) -> Array:
    return np.exp(-((x[:, None] - z[None]) ** 2).sum(axis=-1) / 2.0)
