"""Convolutions before the first stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference
from searchspaces.parts import ACTIVATIONS, Activation, EndCase, Stem
from searchspaces.signature import Signature

NormKind = Literal["none", "layer_norm", "batch_norm"]


def _image(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=10)


class ConvStem(Stem):
    """Convolutions with strides that make tokens on a grid: `image` `[B, S, S, C]` -> `[B, S', S', D]`.

    One convolution, the patch embedding of ConvNeXt, PVT or Swin, or several of half the width each time towards the
    input (Xiao et al. 2021), with a norm after each and an activation between them. `linear`, as in
    NAT, keeps the norm of the last one only.
    """

    paper = "Xiao et al. 2021, Early Convolutions Help Transformers See Better, arXiv 2106.14881"
    modality = "image"
    cases = (
        EndCase({"window": 4, "stride": 4, "norm": "layer_norm"}, signature=_image(8, 3)),
        EndCase({"window": 7, "stride": 4}, batch=1, d_model=5, signature=_image(9, 2)),
        EndCase({"layers": 2, "norm": "batch_norm"}, d_model=6, signature=_image(7, 1)),
        EndCase({"window": 7, "stride": 4, "padding": 2}, d_model=5, signature=_image(11, 1)),
        EndCase({"layers": 2, "first_window": 5, "first_stride": 4, "padding": 1}, d_model=6, signature=_image(11, 1)),
        EndCase({"class_token": True}, d_model=5, signature=_image(6, 1)),
        EndCase({"layers": 2, "norm": "layer_norm", "linear": True}, signature=_image(7, 1)),
        EndCase({"layers": 2, "norm": "batch_norm", "bias": True, "last_activation": True}, signature=_image(7, 1)),
    )

    layers: int = option(1, minimum=1, maximum=8, doc="Convolutions, each of the same window and stride.")
    window: int = option(3, minimum=1, maximum=31, doc="Height and width that an output sees, pixels.")
    stride: int = option(2, minimum=1, maximum=31, doc="Pixels from one output to the next.")
    first_window: int | None = option(None, minimum=1, maximum=31, doc="That of the first; null for the others'.")
    first_stride: int | None = option(None, minimum=1, maximum=31, doc="That of the first; null for the others'.")
    padding: int | None = option(None, minimum=0, maximum=15, doc="Zeros around the image; null for half a window.")
    norm: NormKind = option("none", choices=("none", "layer_norm", "batch_norm"), doc="Norm after each convolution.")
    bias: bool | None = option(None, doc="Add biases to the convolutions; null for unless a batch norm follows.")
    activation: Activation = option("relu", choices=tuple(ACTIVATIONS), doc="Function between convolutions.")
    last_activation: bool = option(False, doc="Put the function after the last convolution too.")
    class_token: bool = option(False, doc="Put a learned token before the others, which then are a sequence.")
    linear: bool = option(False, doc="Neither norm nor function before the last convolution.")

    def check(self, signature: Signature) -> str | None:
        problem = super().check(signature)
        if problem is None and self._side(signature) < 1:
            return f"{self.layers} windows of {self.window} do not fit an image of {signature.image_size}"
        return problem

    def _window(self, index: int) -> tuple[int, int, int]:
        """Window, stride and padding of a convolution."""
        window, stride = self.window, self.stride
        if index == 0:
            window, stride = self.first_window or window, self.first_stride or stride
        if self.padding is not None:
            return window, stride, self.padding
        return window, stride, 0 if window <= stride else window // 2

    def _side(self, signature: Signature) -> int:
        side = signature.image_size
        for index in range(self.layers):
            window, stride, padding = self._window(index)
            side = (side + 2 * padding - window) // stride + 1
        return side

    def _finishes(self, index: int) -> bool:
        """Whether a norm and an activation may follow a convolution."""
        return not self.linear or index == self.layers - 1

    def _activates(self, index: int) -> bool:
        return self.last_activation or index < self.layers - 1

    def num_tokens(self, signature: Signature) -> int:
        return self._side(signature) ** 2 + self.class_token

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        for index in range(self.layers):
            outputs = d_model // 2 ** (self.layers - 1 - index)
            bias = self.norm != "batch_norm" if self.bias is None else self.bias
            window, stride, padding = self._window(index)
            x = convolutions.conv(
                b, x, f"conv{index}", outputs, window=window, stride=stride, padding=padding, bias=bias
            )
            if not self._finishes(index):
                continue
            if self.norm == "batch_norm":
                x = b.batch_norm(x, f"norm{index}")
            elif self.norm == "layer_norm":
                axes = ((Axis("d_model", outputs),),)
                scale = b.parameter(f"norm{index}_scale", axes, "constant(1)")
                x = b.layer_norm(x, scale, b.parameter(f"norm{index}_bias", axes, "constant(0)"))
            x = ACTIVATIONS[self.activation](b, x) if self._activates(index) else x
        if not self.class_token:
            return x
        batch = x.shape[0]
        first = b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)")
        first = b.broadcast(b.reshape(first, 1, 1, d_model), batch, 1, d_model)
        return b.concat(1, first, b.reshape(x, batch, x.shape[1] * x.shape[2], d_model))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        for index in range(self.layers):
            _, stride, padding = self._window(index)
            x = reference.convolve(x, params[f"conv{index}"], stride, padding)
            x = x + params.get(f"conv{index}_bias", 0.0)
            if not self._finishes(index):
                continue
            if self.norm == "batch_norm":
                x = reference.batch_norm(params, f"norm{index}", x)
            elif self.norm == "layer_norm":
                x = reference.layer_norm(x) * params[f"norm{index}_scale"] + params[f"norm{index}_bias"]
            x = reference.ACTIVATIONS[self.activation](x) if self._activates(index) else x
        if not self.class_token:
            return x
        tokens = np.reshape(x, (x.shape[0], -1, x.shape[3]))
        return np.concatenate([np.broadcast_to(params["class_token"], tokens[:, :1].shape), tokens], axis=1)
