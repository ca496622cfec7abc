"""Overlapping patches, gathered in three steps with attention between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature

_SPLITS: Final = ((7, 4, 2), (3, 2, 1))  # window, stride and padding before each attention
_EPSILON: Final = 1e-8  # of the sum of the performer's weights, as published


def _image(size: int, channels: int) -> Signature:
    return Signature(modality="image", output="class", image_size=size, channels=channels, num_classes=10)


class TokensToToken(Stem):
    """Tokens-to-token module (Yuan et al. 2021, T2T-ViT): `image` `[B, S, S, C]` -> `[B, (S / 16)^2, D]`.

    A soft split concatenates the pixels of each window, 7 x 7 every 4 pixels, then 3 x 3 every 2. After each of two a
    layer of width E: k, q, v = norm(x) W + bias; y = v + attend(k, q, v) W_proj + bias; y + gelu(norm(y) W_up) W_down
    with biases. The tokens, an image again, are split a third time and mapped to D: a convolution. A class token comes
    first if asked for.

    `performer` (Choromanski et al. 2021): phi(u) = exp(w u - |u|^2 / 2) / sqrt(M) with M random, untrained rows of w;
    attend_t = phi(q_t) (sum_s phi(k_s) v_s) / (phi(q_t) sum_s phi(k_s) + 1e-8). `softmax`: one head of attention.
    """

    paper = (
        "Yuan et al. 2021, Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet, "
        "arXiv 2101.11986; Choromanski et al. 2021, Rethinking Attention with Performers, arXiv 2009.14794"
    )
    modality = "image"
    cases = (
        EndCase({"width": 4, "class_token": True}, signature=_image(17, 2), d_model=5),
        EndCase({"width": 3, "attention": "softmax"}, batch=1, signature=_image(12, 1), d_model=4),
    )

    width: int = option(64, minimum=2, maximum=4096, doc="Width of the layers between the splits.")
    attention: Literal["performer", "softmax"] = option(
        "performer", choices=("performer", "softmax"), doc="What mixes the tokens between the splits."
    )
    features: float = option(0.5, minimum=0.1, maximum=8.0, doc="Random features of the performer over the width.")
    class_token: bool = option(False, doc="Put a learned token before the others.")

    def _side(self, signature: Signature) -> int:
        side = signature.image_size
        for window, stride, padding in (*_SPLITS, _SPLITS[-1]):
            side = (side + 2 * padding - window) // stride + 1
        return side

    def check(self, signature: Signature) -> str | None:
        if signature.modality == self.modality and signature.image_size < 4:
            return f"a window of 7 does not fit an image of {signature.image_size}"
        return super().check(signature)

    def num_tokens(self, signature: Signature) -> int:
        return self._side(signature) ** 2 + self.class_token

    def grid(self, signature: Signature) -> tuple[int, int] | None:
        return None if self.class_token else (self._side(signature), self._side(signature))

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        for index, (window, stride, padding) in enumerate(_SPLITS):
            x = _soft_split(b, x, window, stride, padding)
            batch, height, width, channels = x.shape
            with b.scope(f"layer{index}"):
                y = self._layer(b, b.reshape(x, batch, height * width, channels))
            x = b.reshape(y, batch, height, width, self.width)
        window, stride, padding = _SPLITS[-1]
        x = convolutions.conv(b, x, "project", d_model, window=window, stride=stride, padding=padding, bias=True)
        tokens = b.reshape(x, x.shape[0], -1, d_model)
        if not self.class_token:
            return tokens
        first = b.reshape(b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)"), 1, 1, d_model)
        return b.concat(1, b.broadcast(first, x.shape[0], 1, d_model), tokens)

    def _layer(self, b: Builder, x: Tensor) -> Tensor:
        hidden = (Axis("hidden", self.width),)
        normed = _norm(b, x, "norm")
        k, q, v = (b.linear(normed, name, hidden, bias=True, init="normal(0.02)") for name in ("k", "q", "v"))
        if self.attention == "softmax":
            o = b.merge_heads(b.attention(*(b.split_heads(each, 1) for each in (q, k, v))))
        else:
            o = self._performer(b, k, q, v)
        y = v + b.linear(o, "proj", hidden, bias=True)
        h = b.gelu(b.linear(_norm(b, y, "norm_channel"), "up", hidden, bias=True))
        return y + b.linear(h, "down", hidden, bias=True)

    def _features(self) -> int:
        return max(1, int(self.features * self.width))

    def _performer(self, b: Builder, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        count = self._features()
        axes = ((Axis("hidden", self.width),), (Axis("features", count),))
        random = b.parameter("random", axes, "normal(1)", trained=False)
        kernels = [
            b.exp(b.matmul(u, random) - b.sum(b.square(u), 2, keepdims=True) * 0.5) * float(np.float32(count**-0.5))
            for u in (k, q)
        ]
        total = b.sum(kernels[0], 1, keepdims=True)
        weight = b.sum(kernels[1] * total, 2, keepdims=True) + _EPSILON
        return b.matmul(kernels[1], b.matmul(kernels[0], v, transpose_a=True)) / weight

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        for index, (window, stride, padding) in enumerate(_SPLITS):
            x = _soft_split_reference(x, window, stride, padding)
            prefix = f"layer{index}."
            own = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            y = self._layer_reference(own, np.reshape(x, (x.shape[0], -1, x.shape[-1])))
            x = np.reshape(y, (*x.shape[:3], self.width))
        x = _soft_split_reference(x, *_SPLITS[-1])
        kernel = params["project"]
        tokens = np.reshape(x, (x.shape[0], -1, x.shape[-1])) @ np.reshape(kernel, (-1, kernel.shape[-1]))
        tokens = tokens + params["project_bias"]
        if not self.class_token:
            return tokens
        first = np.broadcast_to(params["class_token"], (x.shape[0], 1, tokens.shape[-1]))
        return np.concatenate([first, tokens], axis=1)

    def _layer_reference(self, params: Mapping[str, Array], x: Array) -> Array:
        normed = reference.layer_norm(x) * params["norm_scale"] + params["norm_bias"]
        k, q, v = (normed @ params[name] + params[f"{name}_bias"] for name in ("k", "q", "v"))
        o = np.zeros_like(v)
        for t in range(x.shape[1]):
            if self.attention == "softmax":
                weights = reference.softmax(np.einsum("be,bse->bs", q[:, t], k) / self.width**0.5)
            else:
                alike = np.einsum("bm,bsm->bs", self._feature(params, q[:, t]), self._feature(params, k))
                weights = alike / (alike.sum(axis=1, keepdims=True) + float(np.float32(_EPSILON)))
            o[:, t] = np.einsum("bs,bse->be", weights, v)
        y = v + o @ params["proj"] + params["proj_bias"]
        normed = reference.layer_norm(y) * params["norm_channel_scale"] + params["norm_channel_bias"]
        return y + reference.gelu(normed @ params["up"] + params["up_bias"]) @ params["down"] + params["down_bias"]

    def _feature(self, params: Mapping[str, Array], u: Array) -> Array:
        shrunk = np.exp(u @ params["random"] - (u**2).sum(axis=-1, keepdims=True) / 2)
        return shrunk * float(np.float32(self._features() ** -0.5))


def _norm(b: Builder, x: Tensor, name: str) -> Tensor:
    axes = ((Axis("channels", x.shape[-1]),),)
    scale, bias = b.parameter(f"{name}_scale", axes, "constant(1)"), b.parameter(f"{name}_bias", axes, "constant(0)")
    return b.layer_norm(x, scale, bias)


def _soft_split(b: Builder, x: Tensor, window: int, stride: int, padding: int) -> Tensor:
    """The pixels of each window of x `[B, H, W, C]` side by side: `[B, H', W', window^2 C]`."""
    padded = b.pad(b.pad(x, 1, padding, padding), 2, padding, padding)
    rows = (padded.shape[1] - window) // stride + 1
    columns = (padded.shape[2] - window) // stride + 1
    parts: list[Tensor] = []
    for i in range(window):
        row = b.slice(padded, 1, i, i + (rows - 1) * stride + 1, stride)
        parts += [b.slice(row, 2, j, j + (columns - 1) * stride + 1, stride) for j in range(window)]
    return b.concat(-1, *parts)


def _soft_split_reference(x: Array, window: int, stride: int, padding: int) -> Array:
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = range(0, padded.shape[1] - window + 1, stride)
    columns = range(0, padded.shape[2] - window + 1, stride)
    tiles = [[padded[:, i : i + window, j : j + window] for j in columns] for i in rows]
    flat = [np.stack([np.reshape(tile, (x.shape[0], -1)) for tile in row], axis=1) for row in tiles]
    return np.stack(flat, axis=1)
