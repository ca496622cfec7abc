"""Pairs of convolutions before the first stage."""

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


class PairedConvStem(Stem):
    """Pairs of 3 x 3 convolutions, the first of each with a stride of 2 (Fan et al. 2023, RMT).

    `image` `[B, S, S, C]` -> `[B, S / 2^pairs, S / 2^pairs, D]`; the width doubles from pair to pair, a batch norm
    follows every convolution and an activation all but the last. SOFT leaves out the last convolution and ends with an
    activation.
    """

    paper = (
        "Fan et al. 2023, RMT: Retentive Networks Meet Vision Transformers, arXiv 2309.11523; "
        "Lu et al. 2021, SOFT: Softmax-free Transformer with Linear Complexity, arXiv 2110.11945"
    )
    modality = "image"
    cases = (
        EndCase(signature=_image(8, 3)),
        EndCase({"pairs": 1, "activation": "relu"}, batch=1, d_model=5, signature=_image(7, 1)),
        EndCase({"last_single": True, "last_activation": True}, d_model=6, signature=_image(7, 1)),
    )

    pairs: int = option(2, minimum=1, maximum=5, doc="Pairs of convolutions; each halves the image.")
    activation: Activation = option("gelu", choices=tuple(ACTIVATIONS), doc="Function between convolutions.")
    last_single: bool = option(False, doc="Leave out the second convolution of the last pair.")
    last_activation: bool = option(False, doc="Put the function after the last convolution too.")

    @property
    def _last(self) -> int:
        return 2 * self.pairs - 1 - self.last_single

    def num_tokens(self, signature: Signature) -> int:
        return (-(-signature.image_size // 2**self.pairs)) ** 2

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        for index in range(self._last + 1):
            outputs = d_model // 2 ** (self.pairs - 1 - index // 2)
            stride = 2 if index % 2 == 0 else 1
            x = convolutions.conv(b, x, f"conv{index}", outputs, window=3, stride=stride, bias=True)
            x = b.batch_norm(x, f"norm{index}")
            x = ACTIVATIONS[self.activation](b, x) if index < self._last or self.last_activation else x
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        for index in range(self._last + 1):
            x = reference.convolve(x, params[f"conv{index}"], 2 - index % 2) + params[f"conv{index}_bias"]
            x = reference.batch_norm(params, f"norm{index}", x)
            if index < self._last or self.last_activation:
                x = reference.ACTIVATIONS[self.activation](x)
        return x
