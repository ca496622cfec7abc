"""Four neighbouring tokens into one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Transition
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference


class PatchMerging(Transition):
    """Four neighbouring tokens beside each other, normed, under one matrix (Liu et al. 2021, Swin).

    y[i, j] = layer_norm(x[2i, 2j], x[2i + 1, 2j], x[2i, 2j + 1], x[2i + 1, 2j + 1]) W; zeros fill up odd sizes.
    `[B, H, W, C] -> [B, H / 2, W / 2, D]`; 4 C D + 8 C parameters.
    """

    paper = "Liu et al. 2021, Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030"
    cases = (
        Case(grid=(4, 6), d_model=5),
        Case(grid=(5, 3), d_model=4, batch=1),
    )

    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        batch, channels = x.shape[0], x.shape[-1]
        x = convolutions.fill(b, x, 2)
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        tiles = b.transpose(b.reshape(x, batch, rows, 2, columns, 2, channels), 0, 1, 3, 4, 2, 5)
        four = (Axis("patch", 4), Axis("channels", channels))
        scale, bias = (
            b.parameter("norm_scale", (four,), "constant(1)"),
            b.parameter("norm_bias", (four,), "constant(0)"),
        )
        normed = b.layer_norm(b.reshape(tiles, batch, rows, columns, 4 * channels), scale, bias)
        return b.matmul(normed, b.parameter("weight", (four, (Axis("d_model", d_model),))))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        padded = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        four = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        normed = reference.layer_norm(np.concatenate(four, axis=-1)) * params["norm_scale"] + params["norm_bias"]
        return normed @ params["weight"]
