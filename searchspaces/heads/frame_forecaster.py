"""Forecast of the frames of a video."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import numpy as np

from ir.builder import Builder, Tensor
from ir.errors import InputError
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature


def _clip(frames: int, size: int, channels: int, horizon: int) -> Signature:
    return Signature(
        modality="video", output="forecast", seq_len=frames, image_size=size, channels=channels, horizon=horizon
    )


class FrameForecaster(Head):
    """Each token to the pixels of its patch, t frames ahead those of frame t of the input (Tang et al. 2024).

    Tokens of T frames, N patches of P x P pixels in each: x `[B, T N, D]` -> `forecast` `[B, T, S, S, C]`, patch (t, n)
    is x_tn W + bias; (D + 1) P^2 C parameters. P follows from the number of tokens. For a horizon H other than T the
    frames are mixed first, x'_hn = sum_t M_th x_tn, with T H parameters.
    """

    paper = "Tang et al. 2024, Video Prediction Transformers without Recurrence or Convolution, arXiv 2410.04733"
    output = "forecast"
    modalities = ("video",)
    cases = (
        EndCase(time=12, signature=_clip(3, 6, 2, 3)),
        EndCase(batch=1, time=9, d_model=5, signature=_clip(1, 3, 1, 1)),
        EndCase(time=8, d_model=7, signature=_clip(2, 4, 1, 3)),
    )

    def num_tokens(self, signature: Signature) -> int | None:
        return signature.seq_len

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        batch, tokens, d_model = x.shape
        frames, size, channels = signature.seq_len, signature.image_size, signature.channels
        side = isqrt(tokens // frames)
        if side == 0 or frames * side * side != tokens or size % side:
            expected = f"equal square patches of {frames} frames of {size}x{size} pixels"
            raise InputError("tokens are not patches", where="head", expected=expected, found=f"{tokens} tokens")
        patch = size // side
        if signature.horizon != frames:
            times = b.parameter("times", ((Axis("frames", frames),), (Axis("horizon", signature.horizon),)))
            columns = b.transpose(b.reshape(x, batch, frames, side * side * d_model), 0, 2, 1)
            frames = signature.horizon
            x = b.reshape(b.transpose(b.matmul(columns, times), 0, 2, 1), batch, frames * side * side, d_model)
        outputs = (Axis("patch", patch * patch), Axis("channels", channels))
        weight = b.parameter("weight", ((Axis("d_model", d_model),), outputs))
        pixels = b.matmul(x, weight) + b.parameter("bias", (outputs,), "constant(0)")
        tiles = b.reshape(pixels, batch * frames, side, side, patch, patch, channels)
        return b.reshape(b.transpose(tiles, 0, 1, 3, 2, 4, 5), batch, frames, size, size, channels)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        size, horizon = signature.image_size, signature.horizon
        y = np.reshape(x, (len(x), signature.seq_len, -1, x.shape[-1]))
        if horizon != signature.seq_len:
            y = np.einsum("btnd,th->bhnd", y, params["times"])
        patch = size // isqrt(y.shape[2])
        frames = np.zeros((len(x), horizon, size, size, signature.channels))
        corners = [(row, column) for row in range(0, size, patch) for column in range(0, size, patch)]
        for number, (row, column) in enumerate(corners):
            pixels = y[:, :, number] @ params["weight"] + params["bias"]
            shape = (len(x), horizon, patch, patch, signature.channels)
            frames[:, :, row : row + patch, column : column + patch] = np.reshape(pixels, shape)
        return frames
