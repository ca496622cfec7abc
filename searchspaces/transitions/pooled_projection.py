"""Average pooling and a product."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Transition, option
from ir.op import Array
from ir.ops.convolution import Pool
from ir.types import Axis
from searchspaces import reference


class PooledProjection(Transition):
    """Mean of S x S pixels, mapped to the new width, with a batch norm (Li et al. 2022, Next-ViT).

    y[i, j] = bn(mean(x[S i : S i + S, S j : S j + S]) W), `[B, H, W, C] -> [B, ceil(H / S), ceil(W / S), D]`; at the
    border only pixels that exist count. Stride 1 changes the width alone. C D parameters beside the norm.
    """

    paper = (
        "Li et al. 2022, Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic "
        "Industrial Scenarios, arXiv 2207.05501"
    )
    cases = (
        Case(grid=(4, 6), d_model=5),
        Case({"stride": 3}, grid=(5, 7), d_model=4, batch=1),
        Case({"stride": 1}, grid=(3, 4), d_model=4),
    )

    stride: int = option(2, minimum=1, maximum=31, doc="Pixels from one output to the next.")

    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        if self.stride > 1:
            sides = (self.stride, self.stride)
            beyond = tuple((0, -size % self.stride) for size in x.shape[1:3])
            x = b.pool(x, Pool("average", sides, sides, beyond))
        return b.batch_norm(b.linear(x, "weight", (Axis("channels", d_model),)), "norm")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        side = self.stride
        rows = [
            np.stack([x[:, i : i + side, j : j + side].mean(axis=(1, 2)) for j in range(0, x.shape[2], side)], axis=1)
            for i in range(0, x.shape[1], side)
        ]
        return reference.batch_norm(params, "norm", np.stack(rows, axis=1) @ params["weight"])
