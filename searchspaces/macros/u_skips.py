"""Long skips from the first half of the layers to the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.builder import Builder, Tensor
from ir.errors import InputError
from ir.types import Axis
from searchspaces.macros.staged import Assembly, NumberedLayer, Place, Staged

if TYPE_CHECKING:
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class USkips(Staged):
    """Each layer of the second half also reads the output of its mirror image in the first (Bao et al. 2023, U-ViT).

    Of L layers f_0 .. f_{L-1} the first and the last s = floor((L - 1) / 2) are joined: y_l = f_l(y_{l-1}) up to the
    middle, y_l = f_l((y_{l-1}, y_{L-1-l}) W_l + b_l) for l >= L - s, with W_l `[2 D, D]`, scope `skips.l`. So one or
    two layers in the middle have no skip. s (2 D + 1) D parameters more than the plain stack, which W_l = (1, 0) is.
    """

    paper = "Bao et al. 2023, All are Worth Words: A ViT Backbone for Diffusion Models, arXiv 2209.12152"

    def require_fit(self, model: ModelConfig, signature: Signature) -> None:
        reduced = any(layer.reducer.key != "none" for layer in model.layers)
        if len(model.stages) != 1 or model.depth < 3 or reduced:
            raise InputError(
                "the macro u_skips cannot build this model",
                where="macro",
                expected="one stage of 3 layers or more, and no reducer",
                found=f"{len(model.stages)} stages of {model.depth} layers" + (" and a reducer" if reduced else ""),
            )

    def run_layers(self, assembly: Assembly, x: Tensor, layers: Sequence[NumberedLayer], place: Place) -> Tensor:
        skips, outputs = (len(layers) - 1) // 2, list[Tensor]()
        for number, layer in layers:
            if number >= len(layers) - skips:
                with assembly.b.scope(f"skips.{number}"):
                    x = _joined(assembly.b, x, outputs[len(layers) - 1 - number])
            x = assembly.layer(x, number, layer, place)
            outputs.append(x)
        return x


def _joined(b: Builder, x: Tensor, skip: Tensor) -> Tensor:
    """Both streams side by side, through one matrix."""
    streams, d_model = Axis("streams", 2), Axis("d_model", x.shape[-1])
    weight = b.parameter("weight", ((streams, d_model), (d_model,)))
    return b.matmul(b.concat(x.type.rank - 1, x, skip), weight) + b.parameter("bias", ((d_model,),), "constant(0)")
