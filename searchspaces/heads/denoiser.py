"""Prediction of the noise in an image."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.errors import InputError
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Condition, Signature

_EPSILON = 1e-6  # of the published model


def _noisy(size: int, out_channels: int) -> Signature:
    return Signature(
        modality="image",
        output="denoise",
        image_size=size,
        channels=1,
        out_channels=out_channels,
        condition=Condition(timestep=True),
    )


class Denoiser(Head):
    """Each token to the noise in the pixels of its patch (Peebles and Xie 2023, DiT).

    Tokens of N patches of P x P pixels in row order: x `[B, N, D]` -> `noise` `[B, S, S, O]`, patch n is m_n W + bias.
    With `adaptive`, m = norm(x) * (1 + s) + a with (a, s) = silu(c) W_c + bias_c for the condition c `[B, C]`, norm the
    layer norm without parameters; otherwise m = x. All weights start at 0. (D + 1) P^2 O parameters, and 2 (C + 1) D
    for the condition. P follows from the number of tokens.
    """

    paper = (
        "Peebles, Xie 2023, Scalable Diffusion Models with Transformers, arXiv 2212.09748; "
        "Bao et al. 2023, All are Worth Words: A ViT Backbone for Diffusion Models, arXiv 2209.12152"
    )
    output = "denoise"
    modalities = ("image",)
    cases = (
        EndCase(time=9, signature=_noisy(6, 2)),
        EndCase(batch=1, time=1, d_model=5, signature=_noisy(3, 1)),
        EndCase({"adaptive": False}, time=4, d_model=7, signature=_noisy(6, 1)),
    )

    adaptive: bool = option(True, doc="Norm the tokens and let the condition shift and scale them.")

    @property
    def conditioned(self) -> bool:
        return self.adaptive

    def num_tokens(self, signature: Signature) -> int | None:
        return 1 if signature.image_size % 2 else 4

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        batch, tokens, _ = x.shape
        size, channels, side = signature.image_size, signature.out_channels, isqrt(tokens)
        if side * side != tokens or size % side:
            expected = f"equal square patches of {size}x{size} pixels, without a class token"
            raise InputError("tokens are not patches", where="head", expected=expected, found=f"{tokens} tokens")
        patch = size // side
        outputs = (Axis("patch", patch * patch), Axis("channels", channels))
        pixels = b.linear(x, "weight", outputs, bias=True, init="constant(0)")
        tiles = b.reshape(pixels, batch, side, side, patch, patch, channels)
        return b.reshape(b.transpose(tiles, 0, 1, 3, 2, 4, 5), batch, size, size, channels)

    def build_conditioned(self, b: Builder, x: Tensor, signature: Signature, condition: Tensor) -> Tensor:
        if not self.adaptive:
            return self.build(b, x, signature)
        batch, _, d_model = x.shape
        parts = (Axis("parts", 2), Axis("d_model", d_model))
        vectors = b.linear(b.silu(condition), "modulation", parts, bias=True, init="constant(0)")
        shift, scale = (b.reshape(part, batch, 1, d_model) for part in b.split(vectors, -1, d_model, d_model))
        return self.build(b, b.layer_norm(x, epsilon=_EPSILON) * (1.0 + scale) + shift, signature)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        size, side = signature.image_size, isqrt(x.shape[1])
        patch = size // side
        noise = np.zeros((len(x), size, size, signature.out_channels))
        for number in range(side * side):
            row, column = number // side * patch, number % side * patch
            pixels = x[:, number] @ params["weight"] + params["weight_bias"]
            noise[:, row : row + patch, column : column + patch] = np.reshape(pixels, (len(x), patch, patch, -1))
        return noise

    def reference_conditioned(
        self, params: Mapping[str, Array], x: Array, signature: Signature, condition: Array
    ) -> Array:
        if not self.adaptive:
            return self.reference(params, x, signature)
        moved = np.empty_like(x)
        for example, c in enumerate(condition):
            vectors = reference.silu(c) @ params["modulation"] + params["modulation_bias"]
            shift, scale = vectors[: x.shape[2]], vectors[x.shape[2] :]
            moved[example] = reference.layer_norm(x[example], _EPSILON) * (1 + scale) + shift
        return self.reference(params, moved, signature)
