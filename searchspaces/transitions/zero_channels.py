"""New channels of zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, Transition
from ir.errors import InputError
from ir.op import Array


class ZeroChannels(Transition):
    """The same pixels with zeros in the new channels (He et al. 2016, shortcut A), for mixers that fill them.

    `[B, H, W, C] -> [B, H, W, D]`, D at least C; y = [x, 0]. No parameters.
    """

    paper = "He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 3.3"
    cases = (Case(grid=(4, 3), d_model=5),)

    def build(self, b: Builder, x: Tensor, d_model: int) -> Tensor:
        channels = x.shape[-1]
        if d_model < channels:
            raise InputError(
                "zero_channels only widens", where="transition", expected=f"at least {channels}", found=str(d_model)
            )
        return b.pad(x, 3, 0, d_model - channels) if d_model > channels else x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return np.concatenate([x, np.zeros_like(x)], axis=-1)
