"""Orchid's convolution over all tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, TokenMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.convolutions import taps

_FLOOR, _SLOWEST, _FASTEST = 0.01, 1.5, 0.3  # windows fall to the floor after so many sequences, as in Hyena's filters
_LOWEST = 1e-4  # frequency of the first feature
Complex = tuple[Tensor, Tensor]


class Orchid(TokenMixer):
    """Orchid (Karami and Ghodsi 2024): a circular convolution over all tokens whose filter is made of the tokens.

    (x_0, x_1, v) = conv(x W_in + b_in), causal and depthwise; u = x_1 * v;
    o_t = x_0 * (sum_s h_s u_{t-s} + skip * u_t), t - s modulo T, h = filter / T + h(x). With z the last third of
    x W_in + b_in, F the Fourier transform over tokens divided by T, and conv(.) a depthwise convolution and layer norm:
    by `magnitude` (type I) the transform of h(x) is conv(|F conv(z)|^2), two channels to a complex one; by
    `correlation` (type II) it is conj(F conv_k(z)) F conv_q(z). With `residual` o_t gains a convolution of x with a
    filter of its own. y = o W_out + b_out. filter_t is a linear map of E features of t / T, in a window that falls
    exponentially. Grows by T log T.
    """

    paper = (
        "Karami, Ghodsi 2024, Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling, arXiv 2402.18508"
    )
    causality = "bidirectional"
    growth = 1.1
    cases = (
        Case(),
        Case({"conditioning": "correlation", "short_width": 4}, batch=1, time=8, d_model=5),
        Case({"residual": False, "features": 7, "width": 5}, time=5, d_model=4),
        Case({"conditioning": "correlation", "residual": False}, time=1, d_model=6),
    )

    conditioning: Literal["magnitude", "correlation"] = option(
        "magnitude", choices=("magnitude", "correlation"), doc="How the filter depends on the tokens."
    )
    short_width: int = option(3, minimum=1, maximum=64, doc="Tokens that the short convolution sees.")
    width: int = option(3, minimum=1, maximum=63, doc="Tokens, or frequencies, that the filter's convolutions see.")
    features: int = option(33, minimum=3, maximum=1023, doc="Features of a position, an odd number.")
    residual: bool = option(True, doc="Add a convolution of the input with a filter that does not depend on it.")

    def check(self, d_model: int) -> str | None:
        for name, size in (("features", self.features), ("width", self.width)):
            if size % 2 == 0:
                return f"{name} {size} is not odd"
        return None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model, tokens = Axis("d_model", x.shape[-1]), x.shape[1]
        parts = b.linear(x, "in", (Axis("parts", 3), d_model), bias=True)
        short = self._depthwise(b, parts, "short", self.short_width, causal=True)
        first, second, v = b.split(short, -1, *[d_model.size] * 3)
        u, z = second * v, b.slice(parts, -1, 2 * d_model.size, 3 * d_model.size)
        real, imaginary = self._filter(b, "filter", tokens, d_model)
        own_real, own_imaginary = self._adapted(b, z)
        o = self._convolved(b, u, "skip", (real + own_real, imaginary + own_imaginary)) * first
        if self.residual:
            o = o + self._convolved(b, x, "residual_skip", self._filter(b, "residual_filter", tokens, d_model))
        out = b.parameter("out", ((Axis("hidden", d_model.size),), (d_model,)))
        return b.matmul(o, out) + b.parameter("out_bias", ((d_model,),), "constant(0)")

    def _depthwise(self, b: Builder, x: Tensor, name: str, width: int, *, causal: bool, factor: int = 1) -> Tensor:
        """Each channel of x `[B, T, C]` under its own windows, `factor` outputs each."""
        axes = ((taps(width, causal=causal),), (Axis("group", 1),), (Axis("channels", factor * x.shape[-1]),))
        around = (width - 1, 0) if causal else (width // 2, width // 2)
        y = b.conv(x, b.parameter(f"{name}_kernel", axes), padding=(around,), groups=x.shape[-1])
        return y + b.parameter(f"{name}_bias", (axes[2],), "constant(0)")

    def _normed(self, b: Builder, x: Tensor, name: str, factor: int = 1) -> Tensor:
        y = self._depthwise(b, x, name, self.width, causal=False, factor=factor)
        axes = ((Axis("channels", y.shape[-1]),),)
        scale, bias = (b.parameter(f"{name}_norm_{part}", axes, f"constant({i})") for part, i in _FACTORS)
        return b.layer_norm(y, scale, bias)

    def _filter(self, b: Builder, name: str, tokens: int, d_model: Axis) -> Complex:
        """Transform `[1, T // 2 + 1, D]` of a filter that does not depend on the tokens, divided by T."""
        features, window = _positions(tokens, self.features, d_model.size)
        weight = b.parameter(name, ((Axis("features", self.features),), (d_model,)))
        filter = b.matmul(b.constant(features), weight) * b.constant(window)
        return self._transform(b, b.reshape(filter, 1, tokens, d_model.size))

    def _transform(self, b: Builder, x: Tensor) -> Complex:
        real, imaginary = b.rfft(x, 1)
        return real / float(x.shape[1]), imaginary / float(x.shape[1])

    def _adapted(self, b: Builder, z: Tensor) -> Complex:
        """Transform of the filter that the tokens make."""
        if self.conditioning == "correlation":
            (k_real, k_imaginary), (q_real, q_imaginary) = (
                self._transform(b, self._normed(b, z, name)) for name in ("k", "q")
            )
            return k_real * q_real + k_imaginary * q_imaginary, k_real * q_imaginary - k_imaginary * q_real
        real, imaginary = self._transform(b, self._normed(b, z, "near"))
        pairs = self._normed(b, b.square(real) + b.square(imaginary), "spectrum", 2)
        pairs = b.reshape(pairs, *pairs.shape[:2], z.shape[-1], 2)
        first, second = b.split(pairs, -1, 1, 1)
        return b.reshape(first, *real.shape), b.reshape(second, *real.shape)

    def _convolved(self, b: Builder, x: Tensor, skip: str, filter: Complex) -> Tensor:
        """Circular convolution of x with the filter of a transform, and x times a factor for each channel."""
        (real, imaginary), (f_real, f_imaginary) = b.rfft(x, 1), filter
        product = (real * f_real - imaginary * f_imaginary, real * f_imaginary + imaginary * f_real)
        factor = b.parameter(skip, ((Axis("d_model", x.shape[-1]),),), "normal(1)")
        return b.irfft(*product, 1, x.shape[1]) + x * factor

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        size, tokens = x.shape[-1], x.shape[1]
        parts = x @ params["in"] + params["in_bias"]
        short = _convolve(params, "short", parts, self.short_width - 1)
        first, u = short[..., :size], short[..., size : 2 * size] * short[..., 2 * size :]
        features, window = _positions(tokens, self.features, size)
        fixed = {name: features @ params[name] * window / tokens for name in params if name.endswith("filter")}
        own = self._own_filter(params, parts[..., 2 * size :])
        o = first * (_circular(u, fixed["filter"] + own) + params["skip"] * u)
        if self.residual:
            o = o + _circular(x, fixed["residual_filter"] + 0.0 * own) + params["residual_skip"] * x
        return o @ params["out"] + params["out_bias"]

    def _own_filter(self, params: Mapping[str, Array], z: Array) -> Array:
        tokens: int = z.shape[1]
        half = tokens // 2 + 1
        angles = 2.0 * np.pi * np.outer(np.arange(half), np.arange(tokens)) / tokens
        turns = np.cos(angles) - 1j * np.sin(angles)

        def normed(name: str, y: Array) -> Array:
            y = reference.layer_norm(_convolve(params, name, y, self.width // 2))
            return y * params[f"{name}_norm_scale"] + params[f"{name}_norm_bias"]

        if self.conditioning == "correlation":
            k, q = (np.einsum("ft,btd->bfd", turns, normed(name, z)) / tokens for name in ("k", "q"))
            spectrum = np.conj(k) * q
        else:
            pairs = normed("spectrum", np.abs(np.einsum("ft,btd->bfd", turns, normed("near", z)) / tokens) ** 2)
            spectrum = pairs[..., 0::2] + 1j * pairs[..., 1::2]
        own = np.zeros_like(z)
        for f in range(half):  # a frequency between 0 and the highest stands for its negative too
            weight = 1.0 if f == 0 or 2 * f == tokens else 2.0
            for t in range(tokens):
                own[:, t] += weight * (spectrum[:, f] * np.conj(turns[f, t])).real / tokens
        return own


_FACTORS = (("scale", 1), ("bias", 0))


def _positions(tokens: int, features: int, channels: int) -> tuple[Array, Array]:
    """Features `[T, E]` of each position, and the window `[T, D]` of each channel, as a graph holds them."""
    time, bands = np.linspace(0.0, 1.0, tokens), (features - 1) // 2
    angles = np.outer(2.0 * np.pi * np.arange(tokens) / tokens, np.linspace(_LOWEST, max(bands - 1, 0), bands))
    rates = np.linspace(-math.log(_FLOOR) / _SLOWEST, -math.log(_FLOOR) / _FASTEST, channels)
    positions = np.concatenate([time[:, None], np.cos(angles), -np.sin(angles)], axis=1)
    return positions.astype(np.float32), np.exp(-np.outer(time, rates)).astype(np.float32)


def _convolve(params: Mapping[str, Array], name: str, x: Array, before: int) -> Array:
    """Depthwise convolution of x `[B, T, C]` with so many zeros before it."""
    kernel = params[f"{name}_kernel"][:, 0]
    factor = kernel.shape[1] // x.shape[-1]
    y = np.zeros((*x.shape[:2], kernel.shape[1])) + params[f"{name}_bias"]
    for t in range(x.shape[1]):
        for w in range(kernel.shape[0]):
            if 0 <= t + w - before < x.shape[1]:
                y[:, t] += kernel[w] * np.repeat(x[:, t + w - before], factor, axis=-1)
    return y


def _circular(x: Array, filter: Array) -> Array:
    """y_t = sum_s filter_s x_{t-s}, t - s modulo T, a filter for each example."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for s in range(x.shape[1]):
            y[:, t] += filter[:, s] * x[:, (t - s) % x.shape[1]]
    return y
