"""Patches of the frames of a video."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature


def _clip(frames: int, size: int, channels: int) -> Signature:
    return Signature(
        modality="video", output="forecast", seq_len=frames, image_size=size, channels=channels, horizon=frames
    )


class VideoPatches(Stem):
    """Square patches of each frame, each mapped to a token by one matrix (Tang et al. 2024).

    `video` `[B, T, S, S, C]` -> `[B, T (S/P)^2, D]`, frame after frame, each in row order, patch size P;
    (P^2 C + 1) D parameters, the same for all frames.
    """

    paper = "Tang et al. 2024, Video Prediction Transformers without Recurrence or Convolution, arXiv 2410.04733"
    modality = "video"
    cases = (
        EndCase(signature=_clip(3, 8, 2)),
        EndCase({"patch_size": 1}, signature=_clip(2, 3, 1)),
        EndCase({"patch_size": 3}, batch=1, d_model=5, signature=_clip(1, 9, 3)),
    )

    patch_size: int = option(4, minimum=1, maximum=1024, doc="Height and width of a patch, pixels.")

    def check(self, signature: Signature) -> str | None:
        if signature.modality == self.modality and signature.image_size % self.patch_size:
            return f"patch_size {self.patch_size} does not divide the frame size {signature.image_size}"
        return super().check(signature)

    def num_tokens(self, signature: Signature) -> int:
        return signature.seq_len * (signature.image_size // self.patch_size) ** 2

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        batch, frames, size, _, channels = x.shape
        patch, side = self.patch_size, size // self.patch_size
        tiles = b.reshape(x, batch * frames, side, patch, side, patch, channels)
        if patch > 1:
            tiles = b.transpose(tiles, 0, 1, 3, 2, 4, 5)
        inputs = (Axis("patch", patch * patch), Axis("channels", channels))
        weight = b.parameter("weight", (inputs, (Axis("d_model", d_model),)))
        bias = b.parameter("bias", ((Axis("d_model", d_model),),), "constant(0)")
        return b.matmul(b.reshape(tiles, batch, frames * side * side, patch * patch * channels), weight) + bias

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        patch = self.patch_size
        tokens: list[Array] = []
        for frame in range(x.shape[1]):
            for row in range(0, x.shape[2], patch):
                for column in range(0, x.shape[3], patch):
                    pixels = x[:, frame, row : row + patch, column : column + patch]
                    tokens.append(np.reshape(pixels, (x.shape[0], -1)) @ params["weight"] + params["bias"])
        return np.stack(tokens, axis=1)
