"""Convolution and pooling over 1 to 3 spatial axes, channels last.

Shape letters: B batch, S spatial axes, C input channels, O output channels, W window.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np

from ir.op import Array, Op, Types, op, require
from ir.types import TensorType

Sizes = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


def _output_sizes(sizes: Sizes, window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes) -> Sizes:
    lengths = {len(sizes), len(window), len(strides), len(padding), len(dilation)}
    require(len(lengths) == 1, "window, strides, padding and dilation need one entry a spatial axis", found=sizes)
    require(min((*strides, *dilation, *window)) > 0, "window, strides and dilation must be positive", found=window)
    require(min(itertools.chain(*padding)) >= 0, "padding is negative", found=padding)
    outputs = tuple(
        (size + low + high - (width - 1) * step - 1) // stride + 1
        for size, width, stride, (low, high), step in zip(sizes, window, strides, padding, dilation, strict=True)
    )
    require(min(outputs) > 0, "window does not fit the padded input", found=f"{window} over {sizes}")
    return outputs


def _taps(padded: Array, window: Sizes, strides: Sizes, dilation: Sizes, outputs: Sizes) -> list[tuple[Sizes, Array]]:
    """Each tap of the window with the input elements `[B, *outputs, C]` that it meets."""
    taps: list[tuple[Sizes, Array]] = []
    for tap in itertools.product(*map(range, window)):
        index = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, outputs, strides, strict=True)
        )
        taps.append((tap, padded[(slice(None), *index)]))
    return taps


@op
class Conv(Op):
    """Cross-correlation: `[B, *S, C]` with weights `[*W, C / groups, O]` gives `[B, *S', O]`.

    `padding` holds (before, after) for each spatial axis; causal convolution pads before only.
    """

    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int = 1

    def infer(self, x: TensorType, weight: TensorType) -> TensorType:
        require(3 <= x.rank <= 5 and weight.rank == x.rank, "conv needs 1 to 3 spatial axes", found=f"{x} and {weight}")
        require(x.is_float and weight.dtype == x.dtype, "conv needs equal float dtypes", found=f"{x} and {weight}")
        channels, (per_group, outputs) = x.shape[-1], weight.shape[-2:]
        require(
            channels == per_group * self.groups and outputs % self.groups == 0,
            "channels do not fit the groups",
            expected=f"{per_group} x {self.groups} input channels",
            found=f"{channels} in, {outputs} out",
        )
        sizes = _output_sizes(x.shape[1:-1], weight.shape[:-2], self.strides, self.padding, self.dilation)
        return x.with_shape((x.shape[0], *sizes, outputs))

    def evaluate(self, x: Array, weight: Array) -> Array:
        window, (per_group, outputs) = weight.shape[:-2], weight.shape[-2:]
        sizes = _output_sizes(x.shape[1:-1], window, self.strides, self.padding, self.dilation)
        padded = np.pad(x, [(0, 0), *self.padding, (0, 0)])
        result = np.zeros((x.shape[0], *sizes, self.groups, outputs // self.groups), x.dtype)
        for tap, patch in _taps(padded, window, self.strides, self.dilation, sizes):
            grouped = np.reshape(patch, (*patch.shape[:-1], self.groups, per_group))
            kernel = np.reshape(weight[tap], (per_group, self.groups, outputs // self.groups))
            result += np.einsum("...gc,cgo->...go", grouped, kernel)
        return np.reshape(result, (x.shape[0], *sizes, outputs))

    def flops(self, operands: Types, results: Types) -> int:
        return 2 * results[0].size * math.prod(operands[1].shape[:-1])

    def macs(self, operands: Types, results: Types) -> int:
        return self.flops(operands, results) // 2


@op
class Pool(Op):
    """Average or maximum over a window: `[B, *S, C] -> [B, *S', C]`.

    An average counts the padding only if `count_padding`; a maximum never sees it.
    """

    kind: Literal["average", "max"]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    count_padding: bool = False

    def infer(self, x: TensorType) -> TensorType:
        require(self.kind in ("average", "max"), "unknown pooling", expected="average or max", found=self.kind)
        require(3 <= x.rank <= 5, "pool needs 1 to 3 spatial axes", found=x)
        require(x.is_float, "pool needs floating-point input", found=x)
        sizes = _output_sizes(x.shape[1:-1], self.window, self.strides, self.padding, (1,) * len(self.window))
        return x.with_shape((x.shape[0], *sizes, x.shape[-1]))

    def evaluate(self, x: Array) -> Array:
        ones = (1,) * len(self.window)
        sizes = _output_sizes(x.shape[1:-1], self.window, self.strides, self.padding, ones)
        fill = -np.inf if self.kind == "max" else 0.0
        padded = np.pad(x, [(0, 0), *self.padding, (0, 0)], constant_values=fill)
        patches = np.stack([patch for _, patch in _taps(padded, self.window, self.strides, ones, sizes)])
        if self.kind == "max":
            return patches.max(axis=0)
        return patches.sum(axis=0) / self._counts(x.shape[1:-1], sizes)

    def _counts(self, spatial: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
        """Elements that each average divides by, `[1, *sizes, 1]`."""
        if self.count_padding:
            return np.full((1, *sizes, 1), float(math.prod(self.window)))
        inside = np.pad(np.ones((1, *spatial, 1)), [(0, 0), *self.padding, (0, 0)])
        taps = _taps(inside, self.window, self.strides, (1,) * len(self.window), sizes)
        return np.sum([patch for _, patch in taps], axis=0)

    def flops(self, operands: Types, results: Types) -> int:
        return results[0].size * math.prod(self.window)
