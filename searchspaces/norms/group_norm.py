"""Group norm over all tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Norm, option
from ir.op import Array
from ir.types import Axis


class GroupNorm(Norm):
    """Group norm (Wu and He 2018): zero mean and unit variance over all tokens and the channels of a group.

    With one group, PoolFormer's norm, all channels share them (Yu et al. 2022). y = z * scale + bias; 2 D parameters.
    """

    paper = "Wu, He 2018, Group Normalization, arXiv 1803.08494; Yu et al. 2022, MetaFormer, arXiv 2111.11418"
    tokenwise = False
    cases = (Case(), Case({"groups": 3}, batch=1, time=5), Case(d_model=6, grid=(3, 5)))

    groups: int = option(1, minimum=1, maximum=4096, doc="Groups of channels that share mean and variance.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        grouped = b.reshape(x, x.shape[0], -1, self.groups, channels // self.groups)
        centred = grouped - b.mean(grouped, 1, 3, keepdims=True)
        z = centred * b.rsqrt(b.mean(b.square(centred), 1, 3, keepdims=True) + 1e-5)
        axes = ((Axis("d_model", channels),),)
        scale, bias = b.parameter("scale", axes, "constant(1)"), b.parameter("bias", axes, "constant(0)")
        return b.reshape(z, *x.shape) * scale + bias

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        y = np.zeros_like(x)
        size = x.shape[-1] // self.groups
        for example in range(x.shape[0]):
            for group in range(self.groups):
                own = x[example, ..., group * size : (group + 1) * size]
                y[example, ..., group * size : (group + 1) * size] = (own - own.mean()) / np.sqrt(own.var() + 1e-5)
        return y * params["scale"] + params["bias"]
