"""Image patches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature


def _digits(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=10)


class ImagePatches(Stem):
    """Square patches, each mapped to a token by one matrix (Dosovitskiy et al. 2021).

    `image` `[B, S, S, C]` -> `[B, (S/P)^2, D]` in row order, patch size P; (P^2 C + 1) D parameters. A class token, one
    learned vector, comes first if asked for.
    """

    paper = "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv 2010.11929"
    modality = "image"
    cases = (
        EndCase(signature=_digits(6, 3)),
        EndCase({"patch_size": 1}, signature=_digits(3, 1)),
        EndCase({"patch_size": 3}, batch=1, d_model=5, signature=_digits(9, 2)),
        EndCase({"class_token": True}, d_model=5, signature=_digits(4, 1)),
    )

    patch_size: int = option(2, minimum=1, maximum=1024, doc="Height and width of a patch, pixels.")
    class_token: bool = option(False, doc="Put a learned token before the patches.")

    def check(self, signature: Signature) -> str | None:
        if signature.modality == self.modality and signature.image_size % self.patch_size:
            return f"patch_size {self.patch_size} does not divide the image size {signature.image_size}"
        return super().check(signature)

    def num_tokens(self, signature: Signature) -> int:
        return (signature.image_size // self.patch_size) ** 2 + self.class_token

    def grid(self, signature: Signature) -> tuple[int, int] | None:
        side = signature.image_size // self.patch_size
        return None if self.class_token else (side, side)

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        batch, size, _, channels = x.shape
        patch, side = self.patch_size, size // self.patch_size
        if patch > 1:
            tiles = b.reshape(x, batch, side, patch, side, patch, channels)
            x = b.transpose(tiles, 0, 1, 3, 2, 4, 5)
        inputs = (Axis("patch", patch * patch), Axis("channels", channels))
        weight = b.parameter("weight", (inputs, (Axis("d_model", d_model),)))
        bias = b.parameter("bias", ((Axis("d_model", d_model),),), "constant(0)")
        tokens = b.matmul(b.reshape(x, batch, side * side, patch * patch * channels), weight) + bias
        if not self.class_token:
            return tokens
        first = b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)")
        return b.concat(1, b.broadcast(b.reshape(first, 1, 1, d_model), batch, 1, d_model), tokens)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        patch = self.patch_size
        tokens: list[Array] = []
        for row in range(0, x.shape[1], patch):
            for column in range(0, x.shape[2], patch):
                pixels = x[:, row : row + patch, column : column + patch]
                tokens.append(np.reshape(pixels, (x.shape[0], -1)) @ params["weight"] + params["bias"])
        if self.class_token:
            tokens.insert(0, np.broadcast_to(params["class_token"], tokens[0].shape))
        return np.stack(tokens, axis=1)
