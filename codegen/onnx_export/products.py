"""Rows of products, convolutions, pooling and norms.

Convolutions of the graph have channels last, those of ONNX channels first: transposes stand around each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from codegen.onnx_export.emitter import Emitter, Site, Table
from ir.ops import contraction as ct
from ir.ops import convolution as cv
from ir.ops import normalization as nm


def _matmul(e: Emitter, site: Site, a: str, b: str) -> str:
    op: ct.Matmul = site.op
    if op.precision == "bfloat16":
        a, b = e.rounded(a, site.dtype), e.rounded(b, site.dtype)
    if op.transpose_a:
        a = _swapped(e, a, site.types[0].rank)
    if op.transpose_b:
        b = _swapped(e, b, site.types[1].rank)
    return e("MatMul", a, b)


def _swapped(e: Emitter, x: str, rank: int) -> str:
    return e.transpose(x, *range(rank - 2), rank - 1, rank - 2)


def _channels_first(e: Emitter, x: str, rank: int) -> str:
    return e.transpose(x, 0, rank - 1, *range(1, rank - 1))


def _channels_last(e: Emitter, x: str, rank: int) -> str:
    return e.transpose(x, 0, *range(2, rank), 1)


def _sides(padding: cv.Padding) -> list[int]:
    return [low for low, _ in padding] + [high for _, high in padding]


def _conv(e: Emitter, site: Site, x: str, weight: str) -> str:
    op: cv.Conv = site.op
    rank = site.types[0].rank
    result = e(
        "Conv",
        _channels_first(e, x, rank),
        e.transpose(weight, rank - 1, rank - 2, *range(rank - 2)),
        strides=list(op.strides),
        pads=_sides(op.padding),
        dilations=list(op.dilation),
        group=op.groups,
    )
    return _channels_last(e, result, rank)


def _pool(e: Emitter, site: Site, x: str) -> str:
    op: cv.Pool = site.op
    rank, channels = site.types[0].rank, site.types[0].shape[-1]
    planes = _channels_first(e, x, rank)
    places: dict[str, Any] = {"strides": list(op.strides), "pads": _sides(op.padding)}
    narrow = all(max(pair) < width for pair, width in zip(op.padding, op.window, strict=True))
    if op.kind == "average" and (narrow or not op.count_padding):
        counted = int(op.count_padding)
        pooled = e("AveragePool", planes, kernel_shape=list(op.window), count_include_pad=counted, **places)
    elif op.kind == "average":  # pooling of ONNX takes no padding as wide as the window, convolution does
        share = np.full((channels, 1, *op.window), 1.0 / math.prod(op.window))
        pooled = e("Conv", planes, e.floats(share, site.dtype), group=channels, **places)
    else:
        if not narrow:
            low, high = ([0, 0, *(pair[side] for pair in op.padding)] for side in (0, 1))
            planes = e("Pad", planes, e.ints(*low, *high), e.floats(-math.inf, site.dtype))
            places["pads"] = [0] * (2 * len(op.padding))
        pooled = e("MaxPool", planes, kernel_shape=list(op.window), **places)
    return _channels_last(e, pooled, rank)


def _layer_norm(e: Emitter, site: Site, x: str, *factors: str) -> str:
    scale = factors[0] if factors else e.floats(np.ones(site.types[0].shape[-1]), site.dtype)
    return e("LayerNormalization", x, scale, *factors[1:], axis=-1, epsilon=site.op.epsilon)


def _rms_norm(e: Emitter, site: Site, x: str, *factors: str) -> str:
    square = e("ReduceMean", e("Mul", x, x), e.ints(-1), keepdims=1)
    result = e("Div", x, e("Sqrt", e("Add", square, e.floats(site.op.epsilon, site.dtype))))
    return e("Mul", result, factors[0]) if factors else result


def _batch_norm(e: Emitter, site: Site, x: str, scale: str, bias: str, mean: str, variance: str) -> str:
    deviation = e("Sqrt", e("Add", variance, e.floats(site.op.epsilon, site.dtype)))
    return e("Add", e("Mul", e("Sub", x, mean), e("Div", scale, deviation)), bias)


ROWS: Table = {
    ct.Matmul: _matmul,
    cv.Conv: _conv,
    cv.Pool: _pool,
    nm.Softmax: lambda e, site, x: e("Softmax", x, axis=site.op.axis),
    nm.LayerNorm: _layer_norm,
    nm.RmsNorm: _rms_norm,
    nm.BatchNorm: _batch_norm,
}
