"""Convolutions, then patches of what they make."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from searchspaces import convolutions, reference
from searchspaces.parts import ACTIVATIONS, Activation, EndCase, Stem
from searchspaces.signature import Signature


def _image(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=10)


class ConvPatches(Stem):
    """Convolutions of a fixed width and a patch embedding of their result (Jiang et al. 2021, LV-ViT; VOLO).

    `image` `[B, S, S, C]` -> `[B, S / (2 P), S / (2 P), D]`: a window of 7 with a stride of 2, then windows of 3, each
    with batch norm and an activation, then patches of P x P under one matrix with a bias.
    """

    paper = (
        "Jiang et al. 2021, All Tokens Matter: Token Labeling for Training Better Vision Transformers, "
        "arXiv 2104.10858; Yuan et al. 2022, VOLO: Vision Outlooker for Visual Recognition, arXiv 2106.13112"
    )
    modality = "image"
    cases = (
        EndCase({"patch_size": 2, "width": 4}, signature=_image(8, 3)),
        EndCase({"patch_size": 1, "layers": 1, "width": 3}, batch=1, d_model=5, signature=_image(7, 1)),
    )

    layers: int = option(3, minimum=1, maximum=8, doc="Convolutions before the patches.")
    width: int = option(64, minimum=1, doc="Channels of the convolutions.")
    patch_size: int = option(4, minimum=1, maximum=64, doc="Height and width of a patch, after the stride of 2.")
    activation: Activation = option("relu", choices=tuple(ACTIVATIONS), doc="Function after each convolution.")

    def _side(self, signature: Signature) -> int:
        return (signature.image_size + 1) // 2 // self.patch_size

    def check(self, signature: Signature) -> str | None:
        problem = super().check(signature)
        if problem is None and self._side(signature) < 1:
            return f"no patch of {self.patch_size} fits half an image of {signature.image_size}"
        return problem

    def num_tokens(self, signature: Signature) -> int:
        return self._side(signature) ** 2

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        for index in range(self.layers):
            window, stride = (3, 1) if index else (7, 2)
            x = convolutions.conv_norm(b, x, f"conv{index}", self.width, window=window, stride=stride)
            x = ACTIVATIONS[self.activation](b, x)
        patch = self.patch_size
        return convolutions.conv(b, x, "patches", d_model, window=patch, stride=patch, padding=0, bias=True)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        for index in range(self.layers):
            x = reference.convolve(x, params[f"conv{index}"], 1 if index else 2)
            x = reference.ACTIVATIONS[self.activation](reference.batch_norm(params, f"conv{index}_norm", x))
        return reference.convolve(x, params["patches"], self.patch_size, 0) + params["patches_bias"]
