"""Convolutions over the frames of a spectrogram."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature

_WIDTH = 3


def _image(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=5)


class FrameConvs(Stem):
    """Rows of an image as tokens, such as the frames of a spectrogram, under convolutions (Liu et al. 2024, LMUFormer).

    `image` `[B, S, S, C]` -> `[B, S, D]`: a row's S C values are its channels; n times x = batch_norm(relu(conv(x)))
    over 3 rows without bias, then x + conv(x). About 3 (S C + n D) D parameters.
    """

    paper = (
        "Liu et al. 2024, LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, "
        "arXiv 2402.04882"
    )
    modality = "image"
    cases = (
        EndCase(signature=_image(7, 2)),
        EndCase({"layers": 1}, batch=1, d_model=5, signature=_image(4, 1)),
    )

    layers: int = option(4, minimum=1, maximum=32, doc="Convolutions before the last one.")

    def num_tokens(self, signature: Signature) -> int:
        return signature.image_size

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        batch, height, width, channels = x.shape
        x = b.reshape(x, batch, height, width * channels)
        for index in range(self.layers):
            x = b.batch_norm(b.relu(self._convolve(b, x, f"conv{index}", d_model)), f"norm{index}")
        return x + self._convolve(b, x, "position", d_model)

    def _convolve(self, b: Builder, x: Tensor, name: str, d_model: int) -> Tensor:
        axes = ((Axis("width", _WIDTH),), (Axis("channels", x.shape[-1]),), (Axis("d_model", d_model),))
        return b.conv(x, b.parameter(name, axes), padding=((1, 1),))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        def convolve(name: str, x: Array) -> Array:
            padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
            windows = [padded[:, t : t + _WIDTH] for t in range(x.shape[1])]
            return np.stack([np.einsum("bwc,wcd->bd", window, params[name]) for window in windows], axis=1)

        x = np.stack([np.reshape(x[:, row], (x.shape[0], -1)) for row in range(x.shape[1])], axis=1)
        for index in range(self.layers):
            x = reference.batch_norm(params, f"norm{index}", np.maximum(convolve(f"conv{index}", x), 0.0))
        return x + convolve("position", x)
