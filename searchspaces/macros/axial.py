"""Layers that take turns along the axes of a video: time and space."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING

from ir.builder import Tensor
from ir.component import option
from ir.errors import InputError
from searchspaces.macros.staged import Assembly, NumberedLayer, Place, Staged

if TYPE_CHECKING:
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class Axial(Staged):
    """Each layer sees its tokens along one axis, the others side by side in the batch (Tang et al. 2024, PredFormer).

    The tokens of T frames of N patches are x `[B, T N, D]`. Letter i mod L of `axes`, a word of L letters, is the axis
    of layer i: T mixes over time, `[B N, T, D]`; S over space, `[B T, N, D]`, on the grid of a frame for parts that
    need one; F over all tokens. Published are F (full); ST and TS (binary); TST and STS (triplets); TSST and STTS
    (quadruplets); and a letter a layer, first all of one axis and then all of the other (factorised).

    A token costs T, N or T N in a layer whose mixer is quadratic. The parameters are those of the plain stack.
    """

    paper = "Tang et al. 2024, Video Prediction Transformers without Recurrence or Convolution, arXiv 2410.04733"

    axes: str = option("TSST", doc="Axes of the layers in turn: T time, S space, F full.")

    def require_fit(self, model: ModelConfig, signature: Signature) -> None:
        if not self.axes or set(self.axes) - set("TSF"):
            raise InputError(
                "bad axes of the macro axial",
                where="macro.axes",
                expected="a word of T (time), S (space) and F (full)",
                found=repr(self.axes),
            )
        reduced = any(layer.reducer.key != "none" for layer in model.layers)
        if signature.modality != "video" or len(model.stages) != 1 or reduced or signature.condition:
            expected = "a video, one stage, no reducer and no condition"
            raise InputError("the macro axial cannot build this model", where="macro", expected=expected)

    def run_layers(self, assembly: Assembly, x: Tensor, layers: Sequence[NumberedLayer], place: Place) -> Tensor:
        b, frames = assembly.b, assembly.signature.seq_len
        batch, tokens, d_model = x.shape
        patches = tokens // frames
        side = isqrt(patches)
        frame = Place((side, side) if side * side == patches else None, None)
        for number, layer in layers:
            axis = self.axes[number % len(self.axes)]
            if axis == "F":
                x = assembly.layer(x, number, layer, place)
            elif axis == "S":
                y = b.reshape(x, batch * frames, patches, d_model)
                x = b.reshape(assembly.layer(y, number, layer, frame), batch, tokens, d_model)
            else:
                y = b.transpose(b.reshape(x, batch, frames, patches, d_model), 0, 2, 1, 3)
                y = assembly.layer(b.reshape(y, batch * patches, frames, d_model), number, layer, place)
                y = b.transpose(b.reshape(y, batch, patches, frames, d_model), 0, 2, 1, 3)
                x = b.reshape(y, batch, tokens, d_model)
        return x
